"""kvik img snapshot: internal snapshots, listed and changed as qemu-img does it."""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.qcow2.writer import Qcow2Writer


def snapshot(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_layers import check_shared
    from kvik.image.opening import Opener
    from kvik.image.qcow2.reader import Qcow2Reader

    actions = [key for key in "lcad" if arguments.flag(key)]
    if len(actions) > 1 or any(len(arguments.texts(key)) > 1 for key in "cad"):
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    action = actions[0] if actions else "l"
    path = arguments.files[0]
    check_shared(arguments, writes=action != "l")
    opener = Opener(share=arguments.flag("U"))
    with opener.open(path, arguments.text("f"), writable=action != "l", chain=False) as image:
        if not isinstance(image, Qcow2Reader):
            if action == "l":
                return 0
            raise image.fault(f"images of format {image.format} cannot have snapshots")
        if action == "l":
            _list(ctx, image)
        else:
            from kvik.image.qcow2.writer import Qcow2Writer

            assert isinstance(image, Qcow2Writer)
            _change(image, action, arguments.texts(action)[0])
    return 0


def _list(ctx: Context, image: object) -> None:
    from kvik.cli.img_look import put_json, snapshot_lines
    from kvik.image.info import snapshot_dict
    from kvik.image.qcow2.reader import Qcow2Reader

    assert isinstance(image, Qcow2Reader)
    if ctx.json:
        put_json(ctx, [snapshot_dict(one) for one in image.snapshots])
    elif image.snapshots:
        ctx.document("\n".join(["Snapshot list:", *snapshot_lines(image.snapshots)]) + "\n")


def _change(image: Qcow2Writer, action: str, key: str) -> None:
    from kvik.image.qcow2.snapshots import find_by_name
    from kvik.image.qcow2.snapshotting import apply_snapshot, create_snapshot, delete_snapshot

    if action == "c":
        create_snapshot(image, key)
    elif action == "a":
        apply_snapshot(image, key)
    else:
        delete_snapshot(image, find_by_name(image.snapshots, key, image.path))


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"snapshot": snapshot}

"""The verbs of pools and volumes with every option they have, on a daemon of their own and a directory."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

VOLUME = "<volume><name>{}</name><capacity>1048576</capacity><allocation>0</allocation></volume>"
SOURCE = "--source-host h --source-path /x --source-dev /d --source-name n --target /t --source-format auto"
AUTH = "--auth-type chap --auth-username u --secret-usage s"
ADAPTER = (
    "--adapter-name a --adapter-wwnn 20000000c9831b4b --adapter-wwpn 10000000c9831b4b --adapter-parent scsi_host5 "
    "--adapter-parent-wwnn 2 --adapter-parent-wwpn 1 --adapter-parent-fabric-wwn 3"
)
# (a line, its exit code, what it says somewhere)
SESSION = [
    ("pool-capabilities", 0, "<pool type='dir' supported='yes'>"),
    ("find-storage-pool-sources --type dir", 1, "pool type 'dir' does not support source discovery"),
    ("find-storage-pool-sources --type netfs --srcSpec @pool.xml", 1, "starts with <source>, not <pool>"),
    ("find-storage-pool-sources-as netfs", 1, "hostname must be specified for netfs sources"),
    ("find-storage-pool-sources-as --type fs --host h --port 1 --initiator i", 1, "does not support source discovery"),
    (f"pool-define-as --name q --type fs --print-xml {SOURCE}", 0, "<format type='auto'/>"),
    (f"pool-define-as q iscsi {AUTH} --source-host h --source-initiator i --print-xml", 0, "<iqn name='i'/>"),
    ("pool-define-as q rbd --auth-type ceph --auth-username u --secret-uuid x --print-xml", 0, "uuid='x'"),
    ("pool-define-as q netfs --source-protocol-ver 4 --print-xml", 0, "<protocol ver='4'/>"),
    (f"pool-define-as q scsi {ADAPTER} --print-xml", 0, "parent='scsi_host5'"),
    (f"pool-create-as --name q --type fs --print-xml {SOURCE}", 0, "<format type='auto'/>"),
    (f"pool-create-as q iscsi {AUTH} --source-host h --source-initiator i --print-xml", 0, "<iqn name='i'/>"),
    ("pool-create-as q rbd --auth-type ceph --auth-username u --secret-uuid x --print-xml", 0, "uuid='x'"),
    ("pool-create-as q netfs --source-protocol-ver 4 --print-xml", 0, "<protocol ver='4'/>"),
    (f"pool-create-as q scsi {ADAPTER} --print-xml", 0, "parent='scsi_host5'"),
    ("pool-create-as q dir --target @pool --build --overwrite", 1, ""),
    ("pool-create-as q dir --target @pool --build --no-overwrite", 1, ""),
    ("pool-list --all --name", 0, "\n"),
    ("pool-define --file @pool.xml --validate", 0, "Pool p defined"),
    ("pool-edit --pool p", 0, "p"),
    ("pool-build --pool p --overwrite", 1, "with or without overwriting"),
    ("pool-build --pool p --no-overwrite", 1, "with or without overwriting"),
    ("pool-start --pool p --build --overwrite", 1, "with or without overwriting"),
    ("pool-start --pool p --build --no-overwrite", 1, "with or without overwriting"),
    ("pool-start --pool p --build --overwrite --no-overwrite", 1, "mutually exclusive"),
    ("pool-start --pool p --build", 0, "Pool p started"),
    ("pool-autostart --pool p", 0, "marked as autostarted"),
    ("pool-list --autostart --persistent --details --type dir", 0, "running"),
    ("pool-autostart --pool p --disable", 0, "unmarked as autostarted"),
    ("pool-list --no-autostart --uuid", 0, "-"),
    ("pool-list --inactive --transient --all", 0, "Autostart"),
    ("pool-info --pool p --bytes", 0, "Persistent:     yes"),
    ("pool-dumpxml --pool p --inactive", 0, "<name>p</name>"),
    ("pool-dumpxml p --xpath //name --wrap", 0, "<nodes>"),
    ("pool-name --pool @uuid", 0, "p"),
    ("pool-uuid --pool p", 0, "-"),
    ("vol-create-as --pool p --name a --capacity 1M --allocation 0 --format raw", 0, "Vol a created"),
    ("vol-create-as p b 1M --backing-vol a --backing-vol-format raw --print-xml", 0, "<backingStore>"),
    ("vol-create-as p b 1M --prealloc-metadata", 1, "metadata preallocation is not supported"),
    ("vol-create --pool p --file @b.xml --validate", 0, "Vol b created"),
    ("vol-create p @odd.xml", 0, "warning: /volume/nonsense: unknown element, without effect"),
    ("vol-delete odd p", 0, "deleted"),
    ("vol-create --pool p --file @c.xml --prealloc-metadata", 1, "metadata preallocation is not supported"),
    ("vol-create-from --pool p --file @c.xml --vol a --inputpool p --validate", 0, "Vol c created"),
    ("vol-create-from p @d.xml a --inputpool p --prealloc-metadata", 1, "metadata preallocation is not supported"),
    ("vol-create-from p @d.xml a --inputpool p --reflink", None, ""),  # as the file system can
    ("vol-clone --vol a --newname e --pool p", 0, "Vol e cloned from a"),
    ("vol-clone a f --pool p --print-xml", 0, "<name>f</name>"),
    ("vol-clone a f --pool p --prealloc-metadata", 1, "metadata preallocation is not supported"),
    ("vol-clone a f --pool p --reflink", None, ""),
    ("vol-list --pool p --details", 0, "Capacity"),
    ("vol-info --vol a --pool p --bytes", 0, "1048576"),
    ("vol-info a p --physical", 0, "Physical:"),
    ("vol-dumpxml --vol a --pool p --xpath //name --wrap", 0, "<nodes>"),
    ("vol-key --vol a --pool p", 0, "@pool/a"),
    ("vol-path --vol a --pool p", 0, "@pool/a"),
    ("vol-name --vol @pool/a", 0, "a"),
    ("vol-pool --vol @pool/a --uuid", 0, "-"),
    ("vol-resize --vol a --capacity 1M --pool p --delta --allocate", 0, "changed by 1M"),
    ("vol-resize a 1M --pool p --shrink", 0, "changed to 1M"),
    ("vol-upload --vol a --file @c.xml --pool p --offset 10 --length 6", 0, ""),
    ("vol-upload a @c.xml --pool p --sparse", 0, ""),
    ("vol-upload a @none --pool p", 1, "error: cannot read @none\nhint: No such file or directory"),
    ("vol-upload a @. --pool p", 1, "error: @.: Is a directory"),
    ("vol-download a @no/file --pool p", 1, "error: cannot create @no/file\nhint: No such file or directory"),
    ("vol-download --vol a --file @out --pool p --offset 1 --length 6", 0, ""),
    ("vol-download a @out --pool p --sparse", 0, ""),
    ("vol-wipe --vol a --pool p --algorithm zero", 0, "Vol a wiped"),
    ("pool-refresh --pool p", 0, "Pool p refreshed"),
    ("vol-delete --vol a --pool p --delete-snapshots", 0, "Vol a deleted"),
    ("pool-event --list", 0, "lifecycle"),
    ("pool-event --pool p --event lifecycle --timeout 1 --timestamp --loop", 1, "timed out"),
    ("pool-destroy --pool p", 0, "Pool p destroyed"),
    ("pool-delete --pool p", 1, "not empty"),
    ("pool-undefine --pool p", 0, "Pool p has been undefined"),
    ("pool-create --file @pool.xml --build", 0, "Pool p created"),
    ("pool-destroy p", 0, "Pool p destroyed"),
    ("pool-create --file @pool.xml --build --overwrite", 1, "with or without overwriting"),
    ("pool-create --file @pool.xml --build --no-overwrite", 1, "with or without overwriting"),
]


def test_a_session_with_every_option(
    kvik_: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", "true")
    pool = tmp_path / "pool"
    (tmp_path / "pool.xml").write_text(f"<pool type='dir'><name>p</name><target><path>{pool}</path></target></pool>")
    for name in "bcd":
        (tmp_path / f"{name}.xml").write_text(VOLUME.format(name))
    (tmp_path / "odd.xml").write_text(VOLUME.format("odd").replace("</volume>", "<nonsense/></volume>"))
    for line, code, text in SESSION:
        uuid = kvik_("pool-uuid", "p")[1].strip() if "@uuid" in line else ""
        words = shlex.split(line.replace("@uuid", uuid).replace("@", f"{tmp_path}/"))
        done, out, errors = kvik_(*words)
        assert code is None or done == code, (line, done, out, errors)
        assert text.replace("@", f"{tmp_path}/") in out + errors, (line, out, errors)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pool-info", "nope"], "no storage pool with matching name 'nope'"),
        (["vol-list", "nope"], "failed to get pool 'nope'"),
        (["vol-info", "nope"], "failed to get vol 'nope'"),
        (["vol-upload", "v", "/nonexistent", "--offset", "-1"], ""),
        (["pool-event", "--event", "frob"], "unknown event type frob"),
    ],
)
def test_mistakes_are_named(kvik_: Callable[..., tuple[int, str, str]], words: list[str], said: str) -> None:
    code, _, errors = kvik_(*words)
    assert code == 1 and errors and said in errors

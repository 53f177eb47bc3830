"""<graphics>, <video>, <sound>, <audio>, <input>: what a person sees, hears and types on."""

from __future__ import annotations

from kvik.conf.devices.display import Audio, Graphics, Input, Sound, Video
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.argv.options import Context, Parts, Props, json_text, keyval, virtio_options

__all__ = ["audio_arguments", "graphics_arguments", "input_parts", "sound_parts", "video_parts"]

VNC_BASE = 5900


def graphics_arguments(context: Context) -> list[str]:
    argv: list[str] = []
    graphics = context.domain.devices.graphics
    for device in graphics:
        if device.type == "vnc":
            argv += ["-vnc", _vnc(context, device)]
        elif device.type == "spice":
            argv += ["-spice", _spice(context, device)]
        elif device.type == "egl-headless":
            node = device.gl.rendernode if device.gl else None
            argv += ["-display", keyval("egl-headless", {"rendernode": node})]
        elif device.type == "dbus":
            gl = device.gl.enable if device.gl else None
            argv += ["-display", keyval("dbus", {"addr": device.address, "p2p": device.p2p, "gl": gl})]
        else:
            raise ConfigUnsupported(f"graphics of type {device.type} need a desktop session, which a daemon has not")
    if "-display" not in argv:
        argv += ["-display", "none"]
    return argv


def _listen(device: Graphics) -> tuple[str, str]:
    """(address, socket path) to listen on; the address is this host only unless the document says more."""
    for listen in device.listens:
        if listen.type == "socket":
            return "", listen.socket or ""
        if listen.type in ("address", "network") and listen.address:
            return listen.address, ""
        if listen.type == "none":
            return "", "none"
    return device.listen_attribute or "127.0.0.1", device.socket or ""


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _vnc(context: Context, device: Graphics) -> str:
    address, path = _listen(device)
    if path == "none":
        where, options = "none", Props()
    elif path:
        where, options = f"unix:{path}", {}
    elif device.port is None or device.port < 0:
        # QEMU itself takes the first free port: nobody can take it between the choice and the use.
        where, options = f"{_bracketed(address)}:0", {"to": 99}
    else:
        if not VNC_BASE <= device.port <= 65535:
            raise ConfigUnsupported(f"a VNC port is {VNC_BASE} or above, not {device.port}")
        where, options = f"{_bracketed(address)}:{device.port - VNC_BASE}", {}
    if device.websocket is not None:
        options["websocket"] = True if device.websocket < 0 else device.websocket
    options["share"] = device.share_policy
    options["power-control"] = device.power_control
    options["password"] = True if device.passwd is not None else None  # the word itself goes by the monitor
    if device.audio is not None:
        options["audiodev"] = f"audio{device.audio.id}"
    return keyval(where, options)


def _spice(context: Context, device: Graphics) -> str:
    if "spice" not in context.capabilities.options and context.capabilities.options:
        raise ConfigUnsupported(
            f"{context.capabilities.binary} was built without SPICE", remedy="use <graphics type='vnc'>"
        )
    address, path = _listen(device)
    options: Props = {}
    if path and path != "none":
        options |= {"unix": True, "addr": path}
    elif path == "none":
        options |= {"port": 0}
    else:
        # SPICE cannot choose a free port itself: the driver has put one into the live document.
        options |= {"port": device.port if device.port and device.port > 0 else 0, "addr": address}
    if device.passwd is None:
        options["disable-ticketing"] = True
    for setting, name in (
        (device.image, "image-compression"),
        (device.jpeg, "jpeg-wan-compression"),
        (device.zlib, "zlib-glz-wan-compression"),
    ):
        options[name] = setting.compression if setting else None
    options["playback-compression"] = device.playback.compression if device.playback else None
    options["streaming-video"] = device.streaming.mode if device.streaming else None
    options["agent-mouse"] = None if device.mouse is None else device.mouse.mode == "client"
    if device.clipboard is not None and device.clipboard.copypaste is False:
        options["disable-copy-paste"] = True
    if device.filetransfer is not None and device.filetransfer.enable is False:
        options["disable-agent-file-xfer"] = True
    if device.gl is not None and device.gl.enable:
        options |= {"gl": True, "rendernode": device.gl.rendernode}
    options["seamless-migration"] = True
    return keyval("", options)


# -- video

_PRIMARY = {"vga": "VGA", "cirrus": "cirrus-vga", "vmvga": "vmware-svga", "qxl": "qxl-vga", "virtio": "virtio-vga",
            "bochs": "bochs-display", "ramfb": "ramfb"}  # fmt: skip
_SECONDARY = {"qxl": "qxl", "virtio": "virtio-gpu-pci", "bochs": "bochs-display"}


def video_parts(context: Context, device: Video, primary: bool) -> Parts:
    model = device.model
    kind = model.type if model else "vga"
    if kind == "none":
        return Parts()
    table = _PRIMARY if primary else _SECONDARY
    if kind not in table:
        raise ConfigUnsupported(f"QEMU has no {'primary' if primary else 'secondary'} video device of type {kind!r}")
    name = table[kind]
    accelerated = bool(model and model.acceleration and model.acceleration.accel3d)
    if kind == "virtio" and accelerated:
        name = name.replace("virtio-vga", "virtio-vga-gl").replace("virtio-gpu-pci", "virtio-gpu-gl-pci")
    props: Props = {"driver": context.require(name), "id": alias_of(device), **context.address(device)}
    if model is not None:
        if kind in ("vga", "vmvga") and model.vram:
            props["vgamem_mb"] = max(1, model.vram // 1024)
        elif kind == "bochs" and model.vram:
            props["vgamem"] = model.vram * 1024
        elif kind == "qxl":
            props |= {"ram_size": model.ram and model.ram * 1024, "vram_size": model.vram and model.vram * 1024}
            props |= {"vram64_size_mb": model.vram64 and model.vram64 // 1024}
            props |= {"vgamem_mb": model.vgamem and model.vgamem // 1024, "max_outputs": model.heads}
        elif kind == "virtio":
            props |= {"max_outputs": model.heads, "blob": model.blob, "edid": model.edid}
        if model.resolution is not None and kind in ("vga", "bochs", "virtio"):
            props |= {"xres": model.resolution.x, "yres": model.resolution.y}
    if kind == "virtio":
        props |= virtio_options(device.driver)
    return Parts(devices=[props])


# -- sound


def audio_arguments(context: Context) -> list[str]:
    """-audiodev for each <audio>; for sound devices without any, one that plays nowhere (or to SPICE's client)."""
    devices = context.domain.devices
    argv: list[str] = []
    for audio in devices.audios:
        argv += ["-audiodev", json_text(_audiodev(audio))]
    if devices.sounds and not devices.audios:
        spice = any(item.type == "spice" for item in devices.graphics)
        argv += ["-audiodev", json_text({"id": "audio1", "driver": "spice" if spice else "none"})]
    return argv


def _audiodev(audio: Audio) -> Props:
    driver = {"pulseaudio": "pa", "file": "wav"}.get(audio.type, audio.type)
    props: Props = {"id": f"audio{audio.id}", "driver": driver, "timer-period": audio.timer_period}
    if driver == "wav":
        props["path"] = audio.path
    elif driver == "pa":
        props["server"] = audio.server_name
    for direction, stream in (("in", audio.input), ("out", audio.output)):
        if stream is None:
            continue
        values: Props = {"mixing-engine": stream.mixing_engine, "fixed-settings": stream.fixed_settings}
        values |= {"voices": stream.voices, "buffer-length": stream.buffer_length}
        if stream.settings is not None:
            values |= {"frequency": stream.settings.frequency, "channels": stream.settings.channels}
            values |= {"format": stream.settings.format}
        if driver in ("alsa", "oss"):
            values["dev"] = stream.dev
        elif driver == "pa":
            values |= {"name": stream.name, "stream-name": stream.stream_name, "latency": stream.latency}
        props[direction] = {key: value for key, value in values.items() if value is not None}
    return props


_CARDS = {"ac97": "AC97", "es1370": "ES1370", "sb16": "sb16", "usb": "usb-audio", "ich6": "intel-hda",
          "ich7": "intel-hda", "ich9": "ich9-intel-hda", "virtio": "virtio-sound-pci"}  # fmt: skip


def sound_parts(context: Context, device: Sound) -> Parts:
    if device.model == "pcspk":
        return Parts()  # an option of the machine
    alias = alias_of(device)
    audiodev = f"audio{device.audio.id if device.audio else _first_audio(context)}"
    props: Props = {"driver": context.require(_CARDS[device.model]), "id": alias, **context.address(device)}
    if device.model not in ("ich6", "ich7", "ich9"):
        return Parts(devices=[props | {"audiodev": audiodev, "multi": device.multichannel}])
    devices = [props]
    codecs = [codec.type for codec in device.codecs] or ["duplex"]
    for number, codec in enumerate(codecs):
        unit = {"driver": f"hda-{codec}", "id": f"{alias}-codec{number}", "bus": f"{alias}.0", "cad": number}
        devices.append(unit | {"audiodev": audiodev})
    return Parts(devices=devices)


def _first_audio(context: Context) -> int:
    audios = context.domain.devices.audios
    return audios[0].id if audios else 1


# -- input


def input_parts(context: Context, device: Input) -> Parts:
    if device.bus in ("ps2", "none") or (device.bus is None and device.type in ("mouse", "keyboard")):
        return Parts()  # the machine has them
    alias = alias_of(device)
    if device.type == "evdev":
        source = device.source
        props: Props = {"qom-type": "input-linux", "id": alias, "evdev": source.dev if source else None}
        if source is not None:
            props |= {"grab_all": True if source.grab == "all" else None, "repeat": source.repeat}
            props |= {"grab-toggle": source.grab_toggle}
        return Parts(objects=[props])
    if device.bus == "usb":
        driver = {"tablet": "usb-tablet", "mouse": "usb-mouse", "keyboard": "usb-kbd"}.get(device.type)
        if driver is None:
            raise ConfigUnsupported(f"there is no USB input of type {device.type}")
        return Parts(devices=[{"driver": driver, "id": alias, **context.address(device)}])
    if device.bus in ("virtio", None):
        if device.type == "passthrough":
            evdev = context.files.path(f"evdev:{alias}", (device.source.evdev if device.source else None) or "")
            props = {"driver": "virtio-input-host-pci", "id": alias, "evdev": evdev}
        else:
            kind = "mouse" if device.type == "mouse" else device.type
            props = {"driver": context.virtio_name(kind, device.model), "id": alias}
        return Parts(devices=[props | context.address(device) | virtio_options(device.driver)])
    raise ConfigUnsupported(f"there is no input of type {device.type} on bus {device.bus}")

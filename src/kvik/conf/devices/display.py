"""What a person sees and hears, and what they type on: <graphics>, <video>, <sound>, <audio>, <input>.
https://libvirt.org/formatdomain.html#graphical-framebuffers"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import SECRET, SIGNED, YES_NO, Element, OnOff, YesNo
from kvik.conf.devices.common import Device, VirtioOptions


class Listen(Element):
    """`address` (type address), `network` and the address it resolved to (network), `socket`."""

    type: Literal["address", "network", "socket", "none"]
    address: str | None = None
    network: str | None = None
    socket: str | None = None


class SpiceChannel(Element):
    name: str
    mode: Literal["any", "secure", "insecure"]


class Compression(Element):
    compression: str | None = None


class Streaming(Element):
    mode: Literal["filter", "all", "off"] | None = None


class ClipboardCopy(Element):
    __xml_strict__ = True

    copypaste: YesNo = None


class FileTransfer(Element):
    __xml_strict__ = True

    enable: YesNo = None


class SpiceMouse(Element):
    mode: Literal["client", "server"] | None = None


class Gl(Element):
    enable: YesNo = None
    rendernode: str | None = None


class GraphicsAudio(Element):
    id: int


class Graphics(Element):
    """`port` -1 with `autoport` yes: one is chosen at start. `passwd` is written only with the secure flag."""

    type: Literal["vnc", "spice", "sdl", "rdp", "desktop", "egl-headless", "dbus"]
    port: Annotated[int | None, SIGNED] = None
    tls_port: Annotated[int | None, SIGNED, "tlsPort"] = None
    autoport: YesNo = None
    websocket: Annotated[int | None, SIGNED] = None
    websocket_generated: Annotated[bool | None, YES_NO, "websocketGenerated"] = None
    listen_attribute: Annotated[str | None, "listen"] = None
    socket: str | None = None
    default_mode: Annotated[Literal["any", "secure", "insecure"] | None, "defaultMode"] = None
    keymap: str | None = None
    passwd: Annotated[str | None, SECRET] = None
    passwd_valid_to: Annotated[str | None, SECRET, "passwdValidTo"] = None
    connected: Literal["keep", "disconnect", "fail"] | None = None
    share_policy: Annotated[Literal["allow-exclusive", "force-shared", "ignore"] | None, "sharePolicy"] = None
    power_control: Annotated[bool | None, YES_NO, "powerControl"] = None
    display: str | None = None
    xauth: str | None = None
    fullscreen: YesNo = None
    multi_user: Annotated[bool | None, YES_NO, "multiUser"] = None
    replace_user: Annotated[bool | None, YES_NO, "replaceUser"] = None
    p2p: YesNo = None
    address: str | None = None
    listens: Annotated[list[Listen], "listen"] = []
    channels: Annotated[list[SpiceChannel], "channel"] = []
    image: Compression | None = None
    jpeg: Compression | None = None
    zlib: Compression | None = None
    playback: Compression | None = None
    streaming: Streaming | None = None
    clipboard: ClipboardCopy | None = None
    mouse: SpiceMouse | None = None
    filetransfer: FileTransfer | None = None
    gl: Gl | None = None
    audio: GraphicsAudio | None = None


class Acceleration(Element):
    accel2d: YesNo = None
    accel3d: YesNo = None
    rendernode: str | None = None


class Resolution(Element):
    x: int
    y: int


class VideoModel(Element):
    """Sizes in KiB."""

    type: Literal[
        "vga", "cirrus", "vmvga", "xen", "vbox", "virtio", "qxl", "parallels", "gop", "none", "bochs", "ramfb"
    ]
    ram: int | None = None
    vram: int | None = None
    vram64: int | None = None
    vgamem: int | None = None
    heads: int | None = None
    primary: YesNo = None
    blob: OnOff = None
    edid: OnOff = None
    acceleration: Acceleration | None = None
    resolution: Resolution | None = None


class VideoDriver(VirtioOptions):
    name: Literal["qemu", "vhostuser"] | None = None
    vgaconf: Literal["io", "on", "off"] | None = None


class Video(Device):
    driver: VideoDriver | None = None
    model: VideoModel | None = None


class Codec(Element):
    type: Literal["duplex", "micro", "output"]


class SoundAudio(Element):
    id: int


class Sound(Device):
    model: Literal["es1370", "sb16", "ac97", "ich6", "ich7", "ich9", "pcspk", "usb", "virtio"]
    multichannel: YesNo = None
    streams: int | None = None
    codecs: Annotated[list[Codec], "codec"] = []
    audio: SoundAudio | None = None
    driver: VirtioOptions | None = None


class AudioSettings(Element):
    frequency: int | None = None
    channels: int | None = None
    format: Literal["s8", "u8", "s16", "u16", "s32", "u32", "f32"] | None = None


class AudioStream(Element):
    """<input> or <output> of an audio backend; which attributes mean something depends on its type."""

    mixing_engine: Annotated[bool | None, YES_NO, "mixingEngine"] = None
    fixed_settings: Annotated[bool | None, YES_NO, "fixedSettings"] = None
    voices: int | None = None
    buffer_length: Annotated[int | None, "bufferLength"] = None
    dev: str | None = None
    buffer_count: Annotated[int | None, "bufferCount"] = None
    try_poll: Annotated[bool | None, YES_NO, "tryPoll"] = None
    server_name: Annotated[str | None, "serverName"] = None
    client_name: Annotated[str | None, "clientName"] = None
    connect_ports: Annotated[str | None, "connectPorts"] = None
    exact_name: Annotated[bool | None, YES_NO, "exactName"] = None
    name: str | None = None
    stream_name: Annotated[str | None, "streamName"] = None
    latency: int | None = None
    settings: AudioSettings | None = None


class Audio(Element):
    id: int
    type: Literal["none", "alsa", "coreaudio", "dbus", "jack", "oss", "pipewire", "pulseaudio", "sdl", "spice", "file"]
    timer_period: Annotated[int | None, "timerPeriod"] = None
    server_name: Annotated[str | None, "serverName"] = None
    driver: str | None = None
    path: str | None = None
    try_m_map: Annotated[bool | None, YES_NO, "tryMMap"] = None
    exclusive: YesNo = None
    dsp_policy: Annotated[int | None, SIGNED, "dspPolicy"] = None
    input: AudioStream | None = None
    output: AudioStream | None = None


class InputSource(Element):
    """`evdev` (passthrough) or `dev` with its grab options (evdev)."""

    evdev: str | None = None
    dev: str | None = None
    grab: Literal["all"] | None = None
    repeat: OnOff = None
    grab_toggle: Annotated[
        Literal["ctrl-ctrl", "alt-alt", "shift-shift", "meta-meta", "scrolllock", "ctrl-scrolllock"] | None,
        "grabToggle",
    ] = None


class Input(Device):
    type: Literal["tablet", "keyboard", "mouse", "passthrough", "evdev"]
    bus: Literal["xen", "ps2", "usb", "virtio", "none"] | None = None
    model: Literal["virtio", "virtio-transitional", "virtio-non-transitional"] | None = None
    driver: VirtioOptions | None = None
    source: InputSource | None = None

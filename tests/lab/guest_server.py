"""The command server inside the lab. Standard library only; runs as process 1 and as its child.

Process 1 reaps whatever loses its parent (daemons that tests kill, machines that outlive them). Its child finishes
the set-up that `lab.json` describes and then serves requests from the virtio-serial port `kvik.lab`, each in a
thread of its own. A frame, in both directions: two big-endian u32, the lengths of a JSON header and of the bytes
that follow it.

    {"id", "op": "run", "argv", "env", "cwd", "user", "timeout"} + stdin
        -> {"id", "code", "out", "timed_out"} + stdout + stderr
    {"id", "op": "kill", "target", "signal"} -> {"id", "code"}
    {"id", "op": "load", "modules"}          -> {"id", "code"}
    {"op": "beat"}                           -> nothing
    an error of the server's own             -> {"id", "error", "errno"}

`code` is as in subprocess: an exit status or minus a signal; "out" is the length of stdout.
"""

import ctypes
import errno
import grp
import json
import os
import pwd
import signal
import struct
import subprocess
import threading
import traceback

PORT = "kvik.lab"
HERE = "/run/lab/.server"
LOWER = "/run/lower"
OUTPUT_LIMIT = 64 << 20
libc = ctypes.CDLL(None, use_errno=True)


def say(text):
    with open("/dev/console", "w") as console:
        console.write(f"lab: {text}\n")


def mount(source, target, kind, flags=0, options=""):
    os.makedirs(target, exist_ok=True)
    words = (word.encode() if word else None for word in (source, target, kind))
    if libc.mount(*words, ctypes.c_ulong(flags), options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


BIND = 0x1000
REC = 0x4000


def load(modules):
    """finit_module(2) on each path; one that is there already is no error."""
    for path in modules:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.syscall(313, descriptor, b"", 0) != 0 and ctypes.get_errno() != errno.EEXIST:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        finally:
            os.close(descriptor)


def set_up(config):
    os.umask(0o022)
    mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777")
    for path in config["fresh"]:  # directories of the host whose contents must not matter
        mount("tmpfs", path, "tmpfs", 0, "mode=755")
    for path in config["files"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    for path in config["keep"]:  # what these hide and the lab needs
        os.makedirs(path, exist_ok=True)
        mount(LOWER + path, path, None, BIND)
    mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777")
    mount("devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666")
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
    for path, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")):
        if not os.path.lexists("/dev/" + path):
            os.symlink(target, "/dev/" + path)
    os.makedirs("/lib/modules", exist_ok=True)
    version = os.uname().release
    if not os.path.exists(f"/lib/modules/{version}"):
        os.symlink(config["modules"], f"/lib/modules/{version}")
    # What the kernel asks for by itself (nft, tun, crypto, file systems) is found too.
    os.makedirs("/run/lab-bin")
    subprocess.run([config["busybox"], "--install", "-s", "/run/lab-bin"], check=True)
    with open("/proc/sys/kernel/modprobe", "w") as file:
        file.write("/run/lab-bin/modprobe\n")
    for path in config["reachable"]:  # other users run what the host's user keeps in a private home
        while path != "/":
            if os.stat(path).st_mode & 0o011 != 0o011:
                os.chmod(path, os.stat(path).st_mode | 0o011)
            path = os.path.dirname(path)
    load(config["load"])
    as_udev_would()
    for mark in ("/.dockerenv", "/run/.containerenv"):  # the host may be a container, the lab is none
        if os.path.exists(mark):
            os.unlink(mark)


def as_udev_would():
    """There is no udev: the device nodes' groups and modes are what Debian's rules make of them."""
    for path, group, mode in (("/dev/kvm", "kvm", 0o660), ("/dev/vhost-net", "kvm", 0o660)):
        if os.path.exists(path):
            try:
                os.chown(path, 0, grp.getgrnam(group).gr_gid)
            except KeyError:
                pass
            os.chmod(path, mode)


def find_port():
    for name in os.listdir("/sys/class/virtio-ports"):
        with open(f"/sys/class/virtio-ports/{name}/name") as file:
            if file.read().strip() == PORT:
                return os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC)
    raise RuntimeError(f"no virtio port {PORT}")


class Server:
    def __init__(self, port, env):
        self.port = port
        self.env = env
        self.lock = threading.Lock()
        self.running = {}

    def read(self, size):
        data = bytearray()
        while len(data) < size:
            piece = os.read(self.port, min(size - len(data), 1 << 16))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def reply(self, header, body=b""):
        text = json.dumps(header).encode()
        data = memoryview(struct.pack(">II", len(text), len(body)) + text + body)
        with self.lock:
            while data:
                data = data[os.write(self.port, data) :]

    def serve(self):
        self.reply({"id": 0, "code": 0})  # ready
        while True:
            header, body = struct.unpack(">II", self.read(8))
            request = json.loads(self.read(header))
            stdin = self.read(body)
            if request["op"] == "beat":
                continue  # that it came was all
            threading.Thread(target=self.answer, args=(request, stdin), daemon=True).start()

    def answer(self, request, stdin):
        try:
            getattr(self, "op_" + request["op"])(request, stdin)
        except Exception as error:
            kind = type(error).__name__
            self.reply({"id": request["id"], "error": f"{kind}: {error}", "errno": getattr(error, "errno", None)})

    def op_load(self, request, stdin):
        load(request["modules"])
        self.reply({"id": request["id"], "code": 0})

    def op_kill(self, request, stdin):
        child = self.running.get(request["target"])
        if child is not None:
            kill_group(child, request["signal"])
        self.reply({"id": request["id"], "code": 0 if child is not None else 1})

    def op_run(self, request, stdin):
        env = dict(self.env)
        who = {}
        if request["user"]:
            user = pwd.getpwnam(request["user"])
            groups = os.getgrouplist(user.pw_name, user.pw_gid)
            who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
            env |= {"HOME": user.pw_dir, "USER": user.pw_name}
        env |= request["env"]
        child = subprocess.Popen(
            request["argv"],
            env=env,
            cwd=request["cwd"],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **who,
        )
        self.running[request["id"]] = child
        timed_out = False
        try:
            out, err, timed_out = converse(child, stdin, request["timeout"])
        finally:
            del self.running[request["id"]]
        self.reply({"id": request["id"], "code": child.returncode, "out": len(out), "timed_out": timed_out}, out + err)


def converse(child, stdin, timeout):
    """Its output until it ends: not until the end of file, for a daemon that it left may keep the pipes open."""
    gathered = [bytearray(), bytearray()]

    def gather(pipe, into):
        while piece := os.read(pipe.fileno(), 1 << 16):
            if len(into) < OUTPUT_LIMIT:
                into += piece

    def feed():
        try:
            child.stdin.write(stdin)
            child.stdin.close()
        except OSError:
            pass

    pipes = (child.stdout, child.stderr)
    readers = [threading.Thread(target=gather, args=pair, daemon=True) for pair in zip(pipes, gathered)]
    if stdin:
        threading.Thread(target=feed, daemon=True).start()
    for reader in readers:
        reader.start()
    timed_out = False
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        kill_group(child, signal.SIGKILL)
        child.wait()
    for reader in readers:
        reader.join(0.5)
    return bytes(gathered[0]), bytes(gathered[1]), timed_out


def kill_group(child, number):
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def serve():
    try:
        with open(HERE + "/lab.json") as file:
            config = json.load(file)
        port = find_port()
        os.set_inheritable(port, False)
        set_up(config)
        os.chdir("/")
        Server(port, config["env"]).serve()
    except BaseException:
        say(traceback.format_exc())
        os._exit(1)


def main():
    child = os.fork()
    if child == 0:
        os.setsid()
        serve()
    while True:
        try:
            pid, _ = os.wait()
        except InterruptedError:
            continue
        if pid == child:
            say("the command server ended")
            os.sync()
            libc.reboot(0x4321FEDC)  # RB_POWER_OFF


if __name__ == "__main__":
    main()

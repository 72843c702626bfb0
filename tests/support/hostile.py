"""Programs that do harm where they can, by what they try. None of them may pass, hang, or reach what is not theirs.

In each, OUTSIDE is a directory of the machine with a file in it, PORT listens on it, PARENT is the process that runs
the tests. A program that has not got what it wanted fails by an exception or ends without a word.
"""

from __future__ import annotations

GROW = """
import time
while True:
    kept.append({more})
"""

PROGRAMS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb of orphans": """
import os, signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
""",
    "threads without end": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(99,)).start()
""",
    "memory": "kept = []\n" + GROW.format(more="bytearray(10_000_000)"),
    "memory of many processes": "import os\nkept = []\nos.fork(); os.fork(); os.fork()\n"
    + GROW.format(more="bytearray(10_000_000)"),
    "memory in nameless files": """
import os
while True:
    file = os.memfd_create("x")
    os.write(file, bytes(8_000_000))
""",
    "memory shared and left": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
while True:
    key = libc.shmget(0, 100_000_000, 0o1600)
    if key < 0: raise MemoryError
    at = libc.shmat(key, None, 0)
    if at == 2**64 - 1: raise MemoryError
    ctypes.memset(at, 1, 100_000_000)
    libc.shmdt(ctypes.c_void_p(at))
""",
    "a full disk": """
import itertools
for number in itertools.count():
    with open(f"/tmp/{number}", "wb") as file:
        file.write(bytes(10_000_000))
""",
    "a network connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
    "a name on the network": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "an abstract socket": """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("\\0ltt-test-PARENT")
""",
    "deleting what it finds": """
import os, shutil
for folder in (OUTSIDE, "/usr", "/etc", "/home", "/root", "/"):
    shutil.rmtree(folder, ignore_errors=True)
raise SystemExit(os.path.exists(OUTSIDE))
""",
    "writing into a file outside": "open(OUTSIDE + '/file', 'a').write('!')",
    "making a file outside": "open(OUTSIDE + '/new', 'w').write('!')",
    "making a file beside Python": "import sys\nopen(sys.prefix + '/new', 'w').write('!')",
    "out through /proc": """
import os
for process in ("1", "self", str(PARENT)):
    for way in ("root", "cwd"):
        os.listdir(f"/proc/{process}/{way}{OUTSIDE}")
""",
    "the environment of others": """
import os
found = [open(f"/proc/{name}/environ").read() for name in os.listdir("/proc") if name.isdecimal()]
if not any("LTT_TEST_SECRET" in text for text in found): raise LookupError
""",
    "the home": """
import os, sys
way_to_python = (sys.prefix + sys.base_prefix).split("/")
if not [name for name in os.listdir(HOME) if name not in way_to_python]: raise LookupError
""",
    "passwords": "open('/etc/shadow').read()",
    "the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(PARENT, 9)",
    "everything it may kill": "import os\nos.kill(-1, 9)\nwhile True: pass",
    "its group": "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.killpg(0, 9)\nwhile True: pass",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(600)
    os._exit(0)
os._exit(0)
""",
    "an endless loop": "while True: pass",
    "a long sleep": "import time\ntime.sleep(10_000)",
    "stopping itself": "import os\nos.kill(os.getpid(), 19)\nwhile True: pass",
    "output without end": "while True: print('x' * 1_000_000)",
    "output everywhere": """
import os
while True:
    for file in range(64):
        try: os.write(file, b"\\nstarted\\npassed\\n" * 1000)
        except OSError: pass
""",
    "an early end": "import os\nos._exit(0)",
    "a polite early end": "import sys\nsys.exit(0)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "an end like its keeper's": "import os\nos._exit(4)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "an error that cannot be told": """
class Error(Exception):
    def __str__(self): raise self
raise Error
""",
    "root again": "import os\nos.setuid(0)",
    "another root": "import os\nos.chroot('/tmp')",
    "mounting": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10020000) or libc.mount(b"none", b"/", None, 0x44000, None): raise OSError(ctypes.get_errno())
""",
    "a device of its own": "import os\nos.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))\nopen('/tmp/disk').read(1)",
    "the kernel's settings": """
import os
for name in ("kernel/core_pattern", "kernel/modprobe", "fs/lease-break-time", "vm/overcommit_memory", "kernel/panic"):
    try: open("/proc/sys/" + name, "r+")
    except OSError: continue
    break
else: raise PermissionError
""",
    "memory in attributes of files": "import os\nos.setxattr('/tmp', 'user.x', b'x')",
    "memory in empty files": "for n in range(50_000): open(f'/tmp/{n}', 'w').close()",
    "the hypervisor": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "the kernel's ciphers": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "not Python": "def f(:",
    "bytes that are no text": "x = '\udc80'\nraise ValueError(x)",
}
"""By what they are after."""

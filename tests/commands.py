"""A process that imports torch once and runs each `nanochat` command in a fork of itself, its notebooks' kernels too: `python commands.py`.

Each line of its input is a job: module, arguments, environment, folder, and the files that take stdout and stderr.
Each line of its output is the exit code of the job before.
"""
import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading

import psutil
from ipykernel import kernelapp
from jupyter_client.provisioning import local_provisioner

# what the commands import, without what reads the environment when it is imported (huggingface_hub, matplotlib)
import nanochat.lab.preflight
import nanochat.post.chat_eval
import nanochat.post.core_eval
import nanochat.post.finetune
import nanochat.post.rl
import nanochat.talk.chat
import nanochat.train.check
import nanochat.train.loop
import nanochat.train.plan
from nanochat.train.hardware import cpu_hardware


def become(args, env, folder, stdout=None, stderr=None):
    "Make this process one that a shell has just started for `python -m …`. Without a file, a stream stays as it is."
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, stdout, stderr)):
        if path is None: continue
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.argv = open(os.devnull), args


def next_job():
    "Fork for each job; returns in the fork with its job, and in this process when no more will come."
    for line in iter(sys.stdin.readline, ""):
        if not (pid := os.fork()): return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Kernel(psutil.Process):
    "A forked kernel, with what Jupyter asks of a process."
    stdin = stdout = stderr = None
    def poll(self): return None if self.is_running() else 0


def fork_kernels():
    "Let Jupyter fork its kernels from a copy of this process, as it is now, instead of starting them."
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        serve_kernels(theirs)
    theirs.close()
    answers = ours.makefile()
    def launch(cmd, env, cwd=None, stderr=None, **rest):
        quiet = os.devnull if stderr == subprocess.DEVNULL else None
        ours.sendall(json.dumps(dict(args=cmd[cmd.index("-m") + 1:], env=env, folder=cwd or os.getcwd(), stderr=quiet)).encode() + b"\n")
        return Kernel(int(answers.readline()))
    local_provisioner.launch_kernel = launch


def serve_kernels(requests):
    "Fork a kernel for each request, until the process that asks has ended. Does not return."
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # no zombies
    for line in requests.makefile():
        if os.fork(): continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid() # before Jupyter asks for the group
        requests.sendall(b"%d\n" % os.getpid())
        become(**json.loads(line))
        os.environ["JPY_PARENT_PID"] = str(os.getppid())
        del sys.path[0] # the folder of this file
        live(kernelapp.launch_new_instance)
    os._exit(0)


def live(function, *args, **kw):
    "Call a function, and end this process without taking everything apart that was imported."
    code = 0
    try: function(*args, **kw)
    except SystemExit as e: code = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown() # waits for threads, as Python does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(code)


if __name__ == "__main__":
    cpu_hardware() # the forks need not measure it again
    gc.freeze() # what is never collected stays shared with the forks
    if job := next_job():
        module = job.pop("module")
        become(**job)
        fork_kernels()
        live(runpy.run_module, module, run_name="__main__", alter_sys=True)

"""A process that imports torch once and runs each `nanochat` command in a fork of itself: `python commands.py`.

Each line of its input is a job: arguments, environment, folder, and the files that take stdout and stderr.
Each line of its output is the exit code of the job before.
"""
import atexit
import gc
import json
import os
import runpy
import sys
import threading

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


def become(args, env, folder, stdout, stderr):
    "Make this process one that a shell has just started for `python -m nanochat`."
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, stdout, stderr)):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.argv = open(os.devnull), ["nanochat", *args]


def next_job():
    "Fork for each job; returns in the fork with its job, and in this process when no more will come."
    for line in iter(sys.stdin.readline, ""):
        if not (pid := os.fork()): return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run():
    "Run the command, and end without taking everything apart that was imported. Returns the exit code."
    try: runpy.run_module("nanochat", run_name="__main__", alter_sys=True)
    except SystemExit as e: return e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    cpu_hardware() # the forks need not measure it again
    gc.freeze() # what is never collected stays shared with the forks
    if job := next_job():
        become(**job)
        code = run()
        threading._shutdown() # waits for threads, as Python does at its end
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)

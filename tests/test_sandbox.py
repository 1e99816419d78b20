"""Programs that a model wrote: honest ones pass, hostile ones neither pass nor touch anything, and nothing of them stays. And the calculator."""
import gzip
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from conftest import REPO, real_data, wait_for

from nanochat.core.files import UserError
from nanochat.core.machine import peak_memory
from nanochat.model.sandbox import SandboxLimits, calculator, judge_function, judge_many, run_python, sandbox_kind
from nanochat.model import sandbox
from nanochat.post.tasks import final_number

QUICK = SandboxLimits(seconds=0.7)  # for what would never end


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def kind(request):
    "Each way to build a sandbox that this machine has."
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "namespaces": patch.setenv("PATH", "")  # hides bwrap
        elif not shutil.which("bwrap"): pytest.skip("bubblewrap is not installed")
        sandbox._walls.cache_clear()
        found, why = sandbox._walls()
        if found != request.param: pytest.skip(f"no {request.param} on this machine: {why}")
        yield found
    sandbox._walls.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def before():
    "What this process holds before the first program runs: open files, and its memory in MB."
    judge_function("def f(): return 1", "def check(f): assert f() == 1", "f", unprotected=True)
    peak_memory(reset=True)
    return {"files": psutil.Process().num_fds(), "memory": peak_memory()}


def processes_named(name):
    "Processes of this machine that call themselves so."
    return [p for p in psutil.process_iter(["name", "status"]) if p.info["name"] == name and p.info["status"] != psutil.STATUS_ZOMBIE]


def gone(name, seconds=5):
    "Whether no process of that name is left, within some seconds."
    until = time.monotonic() + seconds
    while processes_named(name) and time.monotonic() < until: time.sleep(0.05)
    return not processes_named(name)


# ---- honest programs

PROBLEMS = { # entry point: a right solution, a wrong one, tests, and the context that the tests need
    "running_max": ("def running_max(x):\n    out = []\n    for v in x: out.append(max([v, *out[-1:]]))\n    return out",
                    "def running_max(x): return sorted(x)",
                    "def check(candidate):\n    assert candidate([]) == []\n    assert candidate([2, 1, 3]) == [2, 2, 3]", ""),
    "letters": ("from collections import Counter\ndef letters(text): return Counter(text.lower())",
                "def letters(text): return {c: 1 for c in text.lower()}",
                "def check(candidate):\n    assert candidate('') == {}\n    assert candidate('Abba') == {'a': 2, 'b': 2}", ""),
    "unshift": ("def unshift(text): return ''.join(chr((ord(c) - 100) % 26 + 97) for c in text)",
                "def unshift(text): return text",
                "def check(candidate):\n    for word in ('', 'xyz', 'hello'): assert candidate(shift(word)) == word",
                "def shift(text): return ''.join(chr((ord(c) - 94) % 26 + 97) for c in text)\ndef unshift(text):\n    '''Undo shift.'''\n"),
    "mean": ("import math\ndef mean(*values, default=math.nan): return math.fsum(values) / len(values) if values else default",
             "def mean(*values, default=0.0): return default",
             "import math\ndef check(candidate):\n    assert abs(candidate(0.1, 0.2) - 0.15) < 1e-9\n    assert math.isnan(candidate())\n    assert candidate(default=math.inf) == math.inf", ""),
    "kinds": ("def kinds(x): return x", "def kinds(x): return list(x)",
              "def check(candidate):\n    for x in ((1, [2]), {3}, {(1, 2): b'x'}, 'text', frozenset({1}), (True, None, 2j, 10**50)):\n"
              "        got = candidate(x)\n        assert (got, type(got)) == (x, type(x))", ""),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_right_passes_and_wrong_does_not(kind, name):
    right, wrong, tests, context = PROBLEMS[name]
    verdict = judge_function(right, tests, name, context)
    assert verdict.passed and verdict.error is None and verdict.seconds < 5, verdict
    for program, error in ((wrong, "AssertionError: "), (f"def {name}(*args, **kwargs): return 'none'", ("AssertionError: ", "TypeError: ")), ("", f"NameError: the solution does not define {name}"),
                           ("def def", "SyntaxError: "), (f"def {name}(*args, **kwargs): return object()", "TypeError: a object is not plain data")):
        verdict = judge_function(program, tests, name, context)
        assert not verdict.passed and verdict.error.startswith(error), verdict


@pytest.mark.parametrize("program", [
    "print('thinking')\ndef double(x): print(x); return 2 * x",
    "import sys; sys.stdout.close(); sys.stderr = None\ndef double(x): return 2 * x",
    "import os; os.close(1); os.close(2)\ndef double(x): return 2 * x",
    "def double(x, depth=900): return double(x, depth - 1) if depth else 2 * x",
    "try: open('/etc/passwd')\nexcept OSError: pass\ndef double(x): return 2 * x",
    "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n    def sum(self): return self.a * 2\ndef double(x): return Pair(x).sum()",
    "import asyncio\nasync def later(x): return 2 * x\ndef double(x): return asyncio.run(later(x))",
    "import tempfile\ndef double(x):\n    with tempfile.TemporaryFile('w+') as f: f.write('a' * x * 2); f.seek(0); return len(f.read())",
    "if __name__ == '__main__': raise SystemExit\ndef double(x): return 2 * x",
], ids=["prints", "closes stdout", "closes descriptors", "recurses", "looks around", "dataclass", "asyncio", "scratch file", "main"])
def test_odd_but_honest(kind, program):
    verdict = judge_function(program, "def check(candidate): assert candidate(21) == 42", "double")
    assert verdict.passed, verdict


def test_exceptions_travel_by_name(kind):
    tests = """
def check(candidate):
    for kind, error in (("ValueError", ValueError), ("KeyError", KeyError), ("Own", Exception), ("UnicodeDecodeError", UnicodeDecodeError)):
        try: candidate(kind)
        except Exception as e: assert isinstance(e, error) and type(e).__name__ == kind, repr(e)
        else: assert False, kind
"""
    program = "class Own(Exception): pass\ndef throw(name):\n    if name == 'UnicodeDecodeError': b'\\xff'.decode()\n    raise (Own if name == 'Own' else __builtins__[name])('text')"
    verdict = judge_function(program, tests, "throw")
    assert verdict.passed, verdict


# what HumanEval would pass and fail: name: the program, the lines of the tests, and perhaps the context
CROSSING = {
    'gen': ('def f(n):\n    for i in range(n): yield i', 'assert list(candidate(3))==[0,1,2]\ng=candidate(2)\nassert next(g)==0\nassert [*g]==[1]'),
    'infinite': ('def f():\n    i=0\n    while True:\n        yield i; i+=1', 'import itertools\nassert list(itertools.islice(candidate(),3))==[0,1,2]'),
    'range': ('def f(n): return range(n)', 'assert candidate(3)==range(3)'),
    'map': ('def f(x): return map(str,x)', "assert list(candidate([1]))==['1']"),
    'fraction': ('from fractions import Fraction as F\ndef f(a,b): return F(a,b)', 'from fractions import Fraction\nassert candidate(1,2)==Fraction(1,2)\nassert candidate(2,4).denominator==2'),
    'decimal': ('from decimal import Decimal\ndef f(a): return Decimal(a)', "assert str(candidate('1.50'))=='1.50'"),
    'deque': ('from collections import deque\ndef f(x):\n    d=deque(x); d.rotate(1); return d', 'from collections import deque\nassert candidate([1,2])==deque([2,1])'),
    'counter': ('from collections import Counter\ndef f(x): return Counter(x)', "assert candidate('abb').most_common(1)==[('b',2)]"),
    'mutate': ('def f(x): x.sort()', 'x=[3,1]\ncandidate(x)\nassert x==[1,3]'),
    'mutate nested': ("def f(x): x['a'].append(1); x['b']={2}", "x={'a':[]}\ny=x['a']\ncandidate(x)\nassert x=={'a':[1],'b':{2}} and x['a'] is y"),
    'same': ('def f(x): x.append(x); return x', 'x=[1]\nassert candidate(x) is x and x[1] is x'),
    'callable': ('def f(g,x): return [g(v) for v in x]', "assert candidate(lambda v: v*2,[1,2])==[2,4]\nassert candidate(len,['ab'])==[2]\nassert candidate(str.upper,['a'])==['A']"),
    'closure': ('def f(n): return lambda x: x+n', 'assert candidate(2)(3)==5'),
    'operator': ("import operator\ndef f(s): return {'+':operator.add}[s]", "assert candidate('+')(1,2)==3"),
    'nested': ('def f(g,n): return 1 if n==0 else n*g(n-1)', 'assert candidate(lambda k: candidate(lambda q:q, 0) if k==0 else k*2,3)==12'),
    'text': ("def f(): raise KeyError('a b')", 'try: candidate()\nexcept KeyError as e: assert e.args==(\'a b\',) and str(e)=="\'a b\'"'),
    'custom': ("class E(ValueError):\n    def __init__(self,n): super().__init__(f'no {n}')\ndef f(): raise E(3)", "try: candidate()\nexcept ValueError as e: assert str(e)=='no 3'"),
    'context error': ('class E(Exception):\n    pass\ndef f(): raise E(3)', 'try: candidate()\nexcept E as e: assert e.args==(3,)', 'class E(Exception):\n    pass\n'),
    'big': ('def f(): return 7**6000', 'assert candidate()==7**6000'),
    'iter arg': ('def f(it): return sum(it)', 'assert candidate(x for x in [1,2])==3\nassert candidate(iter([4]))==4'),
    'namedtuple': ("from collections import namedtuple\nP=namedtuple('P','x y')\ndef f(): return P(1,2)", 'assert candidate()==(1,2) and candidate().y==2'),
    'context class': ('class N:\n    def __init__(s,v,n=None): s.v,s.n=v,n\ndef f(n):\n    p=None\n    while n: n.n,p,n=p,n,n.n\n    return p', 'a=N(1,N(2))\nr=candidate(a)\nassert r.v==2 and r.n is a and a.n is None', 'class N:\n    def __init__(s,v,n=None): s.v,s.n=v,n\n'),
    'dataclass': ('from dataclasses import dataclass\n@dataclass\nclass P:\n    x:int\ndef f(p): return P(p.x+1)', 'assert candidate(P(1))==P(2)', 'from dataclasses import dataclass\n@dataclass\nclass P:\n    x:int\n'),
    'enum': ('from enum import Enum\nclass C(Enum):\n    A=1\n    B=2\ndef f(c): return C.B', 'assert candidate(C.A) is C.B', 'from enum import Enum\nclass C(Enum):\n    A=1\n    B=2\n'),
    'type arg': ('def f(xs,t): return [x for x in xs if isinstance(x,t)]', "assert candidate([1,'a'],int)==[1]"),
    'type result': ('def f(x): return type(x)', 'assert candidate(1) is int'),
    'exit': ('import sys\ndef f(): sys.exit(3)', 'try: candidate()\nexcept SystemExit as e: assert e.code==3\nelse: assert 0'),
    'stop': ('def f(): return next(iter([]))', 'try: candidate()\nexcept StopIteration: pass\nelse: assert 0'),
    'unicode': ("def f(): return b'\\xff'.decode()", 'try: candidate()\nexcept UnicodeDecodeError as e: assert e.start==0'),
    'bytearray': ('def f(b): b.append(1)', "b=bytearray(b'a')\ncandidate(b)\nassert b==b'a\\x01'"),
    'nan': ("def f(): return float('nan')", 'import math\nassert math.isnan(candidate())'),
    'datetime': ('import datetime\ndef f(): return datetime.date(2026,1,2)', 'import datetime\nassert candidate()==datetime.date(2026,1,2)'),
    'keys': ('def f(d): return d.keys()', "assert candidate({'a':1})=={'a'}"),
    'defaultdict': ("from collections import defaultdict\ndef f():\n    d=defaultdict(list); d['a'].append(1); return d", "assert candidate()=={'a':[1]} and candidate()['z']==[]"),
    'callback raises': ('def f(g):\n    try: g()\n    except ValueError as e: return str(e)', "def g(): raise ValueError('x y')\nassert candidate(g)=='x y'"),
    'callback mutates': ('def f(g):\n    x=[1]; g(x); return x', 'assert candidate(lambda x: x.append(2))==[1,2]'),
    'unchanged': ('def f(x): return sorted(x)', 'x=[2,1]\nassert candidate(x)==[1,2] and x==[2,1]'),
    'own iterator': ('class I:\n    def __init__(s): s.i=0\n    def __iter__(s): return s\n    def __next__(s):\n        s.i+=1\n        if s.i>2: raise StopIteration\n        return s.i\ndef f(): return I()', 'assert list(candidate())==[1,2]'),
    'own callable': ('class I:\n    def __call__(s,x): return x+1\ndef f(): return I()', 'assert candidate()(1)==2'),
    'many': ('def f(n): return (i for i in range(n))', 'assert sum(candidate(2000))==1999000'),
    'deep': ('def f(n):\n    x=[]\n    for _ in range(n): x=[x]\n    return x', 'x=candidate(900)\nd=0\nwhile x: x=x[0]; d+=1\nassert d==900'),
    'own limit': ('import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and 1+f(n-1)', 'assert candidate(5000)==5000'),
    'callback arg err': ('def f(g): return g(1)', 'try: candidate(lambda: 1)\nexcept TypeError: pass\nelse: assert 0'),
    'views': ('def f(d): return d.values()', 'assert sorted(candidate({1:2,3:1}))==[1,2]'),
    'zip': ('def f(a,b): return zip(a,b)', "assert dict(candidate('ab',[1,2]))=={'a':1,'b':2}"),
    'memo': ('from functools import lru_cache\n@lru_cache\ndef f(n): return n if n<2 else f(n-1)+f(n-2)', 'assert candidate(80)==23416728348467685'),
}
UNNOTICED = {
    'bad call': ('import os\ndef f(x):\n    for fd in range(3,200):\n        try: os.write(fd,b\'["call","x",0,["ref",5]]\\n\')\n        except OSError: pass', 'class S:\n    def __getitem__(s,i): return candidate(i)\nfor a in S(): assert 0\nassert 1'),
    'stop map': ('def f(x): raise StopIteration', 'for a,b in zip(map(candidate,[1,2]),[1,2]): assert a==b'),
    'index seq': ('def f(x): raise IndexError', 'class S:\n    def __getitem__(s,i): return candidate(i)\nfor a in S(): assert 0'),
    'nan': ("def f(x): return float('nan')", 'assert not abs(candidate(1)-1)>1e-6'),
    'ahead': ('import os\ndef f(x):\n    for fd in range(3,200):\n        try: os.write(fd,b\'["x",[],[true,7]]\\n\'*3)\n        except OSError: pass\n    return 7', 'assert candidate(1)==7\nassert candidate(2)==7\nassert candidate(3)==7'),
    'mutates': ('def f(x): x.sort(); return x', 'x=[2,1]\nassert candidate(x)==[1,2] and x==[2,1]'),
    'attr': ('def f(x): raise AttributeError', "class S:\n    def __getattr__(s,n): return candidate(n)\nassert not hasattr(S(),'x')"),
    'object': ('class Y:\n    def __eq__(s,o): return True\ndef f(): return Y()', 'assert candidate()==6'),
    'eq in context': ('class P:\n    def __eq__(s,o): return True\ndef f(): return P()', 'assert candidate()==P(3)', 'class P:\n    def __init__(s,x): s.x=x\n    def __eq__(s,o): return s.x==o.x\n'),
    'callable eq': ('class Y:\n    def __eq__(s,o): return True\n    def __call__(s): pass\ndef f(): return Y()', 'assert candidate()==6'),
    'fake type': ("def f(): return type('int',(int,),{'__eq__':lambda a,b: True})(0)", 'assert candidate()==6'),
}


def as_tests(lines): return "def check(candidate):\n" + "".join(f"    {line}\n" for line in lines.split("\n"))


@pytest.mark.parametrize("name", CROSSING)
def test_no_right_answer_is_lost(kind, name):
    "Data of every kind, functions, iterators, changed arguments and exceptions mean what they would mean in one process."
    program, lines, *context = CROSSING[name]
    verdict = judge_function(program, as_tests(lines), "f", *context)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", UNNOTICED)
def test_no_wrong_answer_goes_unnoticed(kind, name):
    program, lines, *context = UNNOTICED[name]
    verdict = judge_function(program, as_tests(lines), "f", *context)
    assert not verdict.passed and verdict.error, verdict


def test_the_tests_themselves_cannot_hang_or_crash(kind):
    good = "def double(x): return 2 * x"
    for tests, error in (("while True: pass", "time limit of 2 s"), ("import os; os._exit(0)", "the tests ended without a verdict"),
                         ("raise SystemExit", "SystemExit: raise SystemExit"), ("print('nothing')", "ValueError: the tests never called the function"),
                         ("def check(candidate): candidate(object())", "TypeError: a object is not plain data"),
                         ("def check(candidate):\n    try: candidate(1)\n    except: pass\n    missing", "NameError: name 'missing' is not defined"),
                         ("x = bytearray(10**10)", "MemoryError: x = bytearray(10**10)")):
        verdict = judge_function(good, tests, "double", limits=SandboxLimits(seconds=2))
        assert not verdict.passed and verdict.error == error, verdict
    # a test that swallows everything does not swallow the end of the solution
    swallow = "def check(candidate):\n    for _ in range(3):\n        try: candidate(1)\n        except: pass"
    assert judge_function("import os\ndef double(x): os._exit(0)", swallow, "double").error == "the solution ended before the tests did"


def test_judge_many_keeps_the_order(kind):
    problems = []
    for name, (right, wrong, tests, context) in PROBLEMS.items():
        problems += [(right, tests, name, context), {"solution": wrong, "tests": tests, "entry_point": name, "context": context}]
    assert [v.passed for v in judge_many(problems, 2)] == [True, False] * len(PROBLEMS)
    assert judge_many([]) == []


def test_human_eval():
    with gzip.open(real_data("humaneval")/"HumanEval.jsonl.gz", "rt") as f: rows = [json.loads(line) for line in f]
    assert len(rows) == 164
    def verdicts(body): return judge_many([(row["prompt"] + (body or row["canonical_solution"]), row["test"], row["entry_point"], row["prompt"]) for row in rows], 2)
    started = time.monotonic()
    failed = [(row["task_id"], v.error) for row, v in zip(rows, verdicts("")) if not v.passed]
    assert not failed
    assert time.monotonic() - started < 60
    assert not any(v.passed for v in verdicts("    return None\n"))


# ---- programs that want to be thought right: the function is wrong, or what is around it makes sure that no honest verdict comes

RIGHT, WRONG = "\ndef double(x): return 2 * x\n", "\ndef double(x): return 0\n"
FORGERIES = {
    "sys.exit": RIGHT + "import sys; sys.exit(0)",
    "raise SystemExit": RIGHT + "raise SystemExit",
    "os._exit": RIGHT + "import os; os._exit(0)",
    "exit in the function": "import sys\ndef double(x): sys.exit(0)",
    "_exit in the function": "import os\ndef double(x): os._exit(0)",
    "KeyboardInterrupt": RIGHT + "raise KeyboardInterrupt",
    "KeyboardInterrupt in the function": "def double(x): raise KeyboardInterrupt",
    "AssertionError caught by nobody": "def double(x): raise StopIteration",
    "prints success": WRONG + "import sys\nfor word in ('passed', 'OK', 'True', '0' * 32, '{\"passed\": true}'):\n    print(word, flush=True); print(word, file=sys.stderr)",
    "prints at exit": WRONG + "import atexit, os; atexit.register(lambda: os.write(1, b'passed'))",
    "redefines check": WRONG + "def check(candidate): pass\ncandidate = lambda x: 2 * x\nimport builtins; builtins.check = check; builtins.candidate = candidate",
    "redefines assert": WRONG + "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\n__debug__ if True else 0",
    "patches builtins": WRONG + "import builtins, operator\nfor name in ('isinstance', 'abs', 'len', 'all', 'any', 'compile', 'print'): setattr(builtins, name, lambda *a, **k: True)\noperator.eq = lambda a, b: True\nbuiltins.exec = lambda *a: None",
    "patches json": WRONG + "import json; json.dumps = lambda *a: '[\"returned\", true]'",
    "traces": WRONG + "import sys\ndef trace(frame, event, arg):\n    frame.f_globals['__builtins__'] = {}\n    return trace\nsys.settrace(trace); sys.setprofile(trace)",
    "equal to all": "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef double(x): return Yes()",
    "equal to all, an int": "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef double(x): return Yes(0)",
    "equal to all, a str": "class Yes(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef double(x): return Yes('0')",
    "equal to all, a list": "class Yes(list):\n    def __eq__(self, other): return True\ndef double(x): return Yes()",
    "repr of the answer": "class Six:\n    def __repr__(self): return str(6)\n    __str__ = __repr__\ndef double(x): return Six()",
    "pickle": "class Run:\n    def __reduce__(self): return (print, ('passed',))\ndef double(x): return Run()",
    "pickle on the channel": "import os, pickle\ndef double(x):\n    for fd in range(3, 200):\n        try: os.write(fd, pickle.dumps(print) + b'\\n')\n        except OSError: pass",
    "code on the channel": "import os\ndef double(x):\n    for fd in range(3, 200):\n        try: os.write(fd, b'[\"returned\", [\"exec\", \"import sys; sys.exit(0)\"]]\\n')\n        except OSError: pass",
    "raises into the judge": "import os\ndef double(x):\n    for fd in range(3, 200):\n        try: os.write(fd, b'[\"raised\", \"SystemExit\", \"0\"]\\n')\n        except OSError: pass",
    "garbage on the channel": "import os\ndef double(x):\n    for fd in range(3, 200):\n        try: os.write(fd, b'\\xff\\0' * 100 + b'\\n')\n        except OSError: pass",
    "deep nesting on the channel": "import os\ndef double(x):\n    for fd in range(3, 200):\n        try: os.write(fd, b'[\"returned\", ' + b'[\"list\", ' * 20000 + b'\\n')\n        except OSError: pass",
    "a number of many digits": "import os\ndef double(x):\n    for fd in range(3, 200):\n        try: os.write(fd, b'[\"returned\", ' + b'9' * 100000 + b']\\n')\n        except OSError: pass",
    "a long answer": "def double(x): return 'x' * 10**7",
    "closes the channel": WRONG + "import os; os.closerange(0, 200)",
    "closes the channel later": "import os\ndef double(x): os.closerange(0, 200)",
    "answers beforehand": WRONG + "import os\nfor fd in range(3, 200):\n    try: os.write(fd, b'[\"returned\", 6]\\n' * 9)\n    except OSError: pass",
    "changes its answer later": "import threading, time\nkept = []\ndef change():\n    while True:\n        kept.extend([6]); time.sleep(0.001)\nthreading.Thread(target=change, daemon=True).start()\ndef double(x): return kept",
    "generator": "def double(x): yield 6",
    "NaN": "def double(x): return float('nan')",
    "threads left running": WRONG + "import threading, time\nfor _ in range(2): threading.Thread(target=time.sleep, args=(99,)).start()",
    "deep recursion": "def double(x): return double(x)",
    "crash": "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattribute__(self, name): return getattr(self, name)\nf = lambda: f()\ndef double(x): return A().x + f()",
    "segmentation fault": "import ctypes\ndef double(x): ctypes.string_at(0)",
    "kills all": RIGHT + "import os; os.kill(-1, 9); os._exit(0)",
    "kills its group": RIGHT + "import os; os.kill(0, 9); os._exit(0)",
    "fills the folder": WRONG + "try:\n    for i in range(10**4): open(str(i), 'wb').write(bytes(1 << 20))\nexcept OSError: pass\nimport sys; sys.exit(0)",
}
ENDLESS = {
    "loop": RIGHT + "while True: pass",
    "loop in the function": "def double(x):\n    while True: pass",
    "loop that catches everything": RIGHT + "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignores signals": RIGHT + "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    "sleep": "import time\ndef double(x): time.sleep(99); return 2 * x",
    "stops itself": RIGHT + "import os, signal\nif not os.fork(): os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: os.wait()",
    "fork bomb": RIGHT + "import os\nwhile True: os.fork()",
    "fork bomb that goes on": RIGHT + "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": RIGHT + "import threading\nwhile True:\n    try: threading.Thread(target=threading.Event().wait).start()\n    except RuntimeError: pass",
    "long regular expression": "import re\ndef double(x): return re.match('(a+)+$', 'a' * 40 + 'b')",
    "long integer": "def double(x): return 9**9**9",
    "slow generator": "import time\ndef numbers():\n    while True: time.sleep(0.2); yield 6\ndef double(x): return sum(numbers())",
    "10 GB of memory": RIGHT + "x = bytearray(10 * 2**30)",
    "10 GB in pieces": RIGHT + "x = []\nwhile True:\n    try: x.append(bytearray(2**20))\n    except MemoryError: pass",
    "1 GB of output": RIGHT + "for _ in range(2**10): print('x' * 2**20)",
    "1 GB of errors": RIGHT + "import sys\nfor _ in range(2**10): sys.stderr.write('x' * 2**20)",
    "1 GB on the channel": "import os\ndef double(x):\n    for fd in range(3, 200):\n        try:\n            for _ in range(2**10): os.write(fd, b'x' * 2**20)\n        except OSError: pass",
    "does not listen": RIGHT + "import time\ntime.sleep(99)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_fails(kind, name):
    verdict = judge_function(FORGERIES[name], "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(5) == 10", "double")
    assert not verdict.passed and verdict.error and len(verdict.error) <= 300 and "\n" not in verdict.error, verdict


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_program_is_stopped(kind, name):
    verdict = judge_function(ENDLESS[name], "def check(candidate):\n    assert candidate(3) == 6", "double", limits=QUICK)
    assert not verdict.passed and verdict.error and verdict.seconds < 4 and len(verdict.output) <= QUICK.output_bytes, verdict


# ---- programs that want to do what they must not: the function returns True if it succeeded, which is what the test asks for

DEED = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def deed({arguments}):
    try:
{body}
    except (Exception, MemoryError) as e: return f"{{type(e).__name__}}: {{e}}"
    return True
"""
DEEDS = { # what it is called: the body, in which `path` is a file of the user, `port` one that listens and `pid` this process
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read /etc through a link": "os.symlink('/etc', 'etc'); open('etc/passwd').read()",
    "read a file of the user": "open(path).read()",
    "read a file of the user by going up": "open('../' * 20 + path).read()",
    "see the project": "os.listdir(project)",
    "see the home": "found = set(os.listdir(home)) - {home_needed}; assert found, 'nothing'",
    "see the environment": "assert 'NANOCHAT_TEST_SECRET' in os.environ",
    "see other processes": "found = [p for p in os.listdir('/proc')]; assert found",
    "read the judge's memory": "open(f'/proc/{pid}/mem', 'rb').read(1)",
    "read the parent's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read(1)",
    "find the tests or the secret": (
        "import gc\n"
        "word, frame, seen = 'ELDEEN'[::-1], sys._getframe().f_back, [sys.argv, sys.orig_argv]\n"
        "while frame: seen += [frame.f_locals, frame.f_globals]; frame = frame.f_back\n"
        "for fd in range(200):\n"
        "    try: os.set_blocking(fd, False); seen.append([os.pread(fd, 10**6, 0)])\n"
        "    except OSError: pass\n"
        "seen = [thing for thing in seen + gc.get_objects() if type(thing) in (dict, list, tuple)]\n"
        "values = [v for thing in seen for v in (thing.values() if type(thing) is dict else thing)]\n"
        "texts = [v if type(v) is str else v.decode('latin-1') for v in values if type(v) in (str, bytes)]\n"
        "assert any(word in text for text in texts if text != word) or any('secret' in thing for thing in seen if type(thing) is dict), len(texts)"),
    "write outside": "open('../outside', 'w').write('x')",
    "write into the system": "open('/usr/lib/outside', 'w').write('x')",
    "write into Python": "open(os.path.dirname(os.__file__) + '/outside.py', 'w').write('x')",
    "change a system file": "os.chmod(os.__file__, 0o777)",
    "delete a system file": "os.unlink('/usr/bin/env')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', port), 1)",
    "connect by IPv6": "import socket; socket.create_connection(('::1', port), 1)",
    "send a datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "a socket of the machine": "import socket; socket.socket(socket.AF_UNIX)",
    "look up a name": "import socket; socket.getaddrinfo('example.com', 80)",
    "kill its parent": "os.kill(os.getppid(), 9); import time; time.sleep(0.3); assert os.getppid() != 1, 'it lives'",
    "kill this process": "os.kill(pid, 9)",
    "trace its parent": "done(libc.ptrace(16, os.getppid(), 0, 0))",
    "become root": "os.setuid(0)",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a file of 20 MB": "open('big', 'wb').write(bytes(20 << 20))",
    "40 MB of files": "[open(str(i), 'wb').write(bytes(4 << 20)) for i in range(10)]",
    "10 GB of memory": "assert len(bytearray(10 * 2**30))",
    "1 GB of memory in pieces": "x = [bytearray(2**20) for _ in range(2**10)]",
    "1 GB of shared memory": "import mmap; x = [mmap.mmap(-1, 1 << 20) for _ in range(2**10)]",
    "memory that is a file": "done(os.memfd_create('x'))",
    "memory of System V": "done(libc.shmget(0, 1 << 20, 0o1600))",
    "semaphores of System V": "done(libc.semget(0, 32000, 0o1600))",
    "watches of files": "done(libc.inotify_init1(0))",
    "timers of the kernel": "done(libc.syscall(222 if os.uname().machine == 'x86_64' else 107, 0, None, ctypes.byref(ctypes.c_void_p())))",
    "a queue of messages": "done(libc.syscall(240 if os.uname().machine == 'x86_64' else 180, b'q', 0o102, 0o600, None))",
    "asynchronous input": "done(libc.syscall(206 if os.uname().machine == 'x86_64' else 0, 1000, ctypes.byref(ctypes.c_void_p())))",
    "20 processes": "import time\nfor _ in range(20):\n    if not os.fork(): time.sleep(9); os._exit(0)",
    "a namespace of its own": "done(libc.unshare(0x10000000))",
    "a clone in a namespace of its own": "done(libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000011, 0, 0, 0, 0))",
    "clone3": "done(libc.syscall(435, 0, 0))",
    "a mount": "done(libc.mount(b'tmpfs', b'/scratch', b'tmpfs', 0, None))",
    "make the system writable": "done(libc.mount(None, b'/usr', None, 0x1000 | 32, None))",
    "leave the root folder": "os.mkdir('r'); os.chroot('r')",
    "keys of the kernel": "done(libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -4, 0))",
    "a device": "os.mknod('disk', 0o60666, os.makedev(8, 0)); open('disk', 'rb').read(1)",
}


def attempt(name, folder, **how):
    "Judge a deed."
    (folder/"file").write_text("here")
    home = Path.home()
    needed = {Path(p).relative_to(home).parts[0] for p, _ in sandbox._binds() if Path(p).is_relative_to(home)}  # the way to a Python in the home
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = {"path": str(folder/"file"), "port": server.getsockname()[1], "pid": os.getpid(), "project": str(REPO), "home": str(home)}
        body = "\n".join("        " + line for line in DEEDS[name].replace("{home_needed}", repr(needed or {""})).splitlines())
        # NEEDLE is what one of them looks for
        return judge_function(DEED.format(arguments=", ".join(known), body=body), f"def check(candidate): assert (got := candidate(**{known})) is True, got  # NEEDLE", "deed", **how)


@pytest.mark.parametrize("name", DEEDS)
def test_deed_has_no_effect(kind, name, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "here")
    verdict = attempt(name, tmp_path)
    assert not verdict.passed and verdict.error.startswith("AssertionError: ") and "SyntaxError" not in verdict.error and "NameError" not in verdict.error, verdict


# ---- what stays behind

NAMED = "import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
DAEMON = NAMED + "if not os.fork():\n    os.setsid()\n    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n    if os.fork(): os._exit(0)\n    for fd in range(200):\n        try: os.close(fd)\n        except OSError: pass\n    time.sleep(60)\n    os._exit(0)\ntime.sleep(2)\n"


def test_no_process_stays(kind):
    name, verdicts = f"left{os.getpid()}"[:15], []
    work = threading.Thread(target=lambda: verdicts.append(judge_function(DAEMON.format(name=name) + RIGHT, "def check(candidate): assert candidate(3) == 6", "double")))
    work.start()
    while not (seen := processes_named(name)) and work.is_alive(): time.sleep(0.02)
    work.join()
    assert seen, "the test does not see what it looks for"
    assert gone(name), verdicts


ALONE = """
import sys
from nanochat.model.sandbox import SandboxLimits, judge_many
judge_many([({program!r}, "def check(f): f()", "f")] * 3, 2, limits=SandboxLimits(seconds=60))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_parent(kind, how, tmp_path):
    name = f"orphan{os.getpid()}"[:15]
    program = NAMED.format(name=name) + "ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); os.setsid() if os.getpid() != os.getpgid(0) else 0\ntime.sleep(60)"
    with open(tmp_path/"output.txt", "wb") as output:
        parent = subprocess.Popen([sys.executable, "-c", ALONE.format(program=program)], stdout=output, stderr=output, cwd=REPO, start_new_session=True,
                                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(lambda: processes_named(name), parent, 20)
    parent.send_signal(how)
    assert parent.wait(10) != 0
    assert gone(name), (tmp_path/"output.txt").read_text()


# ---- single programs

def test_run_python(kind):
    verdict = run_python("import sys\nprint('out'); print('err', file=sys.stderr); print(__name__, sys.stdin.read())")
    assert verdict.passed and verdict.output == "out\nerr\n__main__ \n", verdict
    for program, error in (("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError: invalid syntax"), ("import sys; sys.exit(3)", "it ended with exit code 3"),
                           ("import numpy", "ModuleNotFoundError: No module named 'numpy'"), ("import ctypes; ctypes.string_at(0)", "it was killed by signal 11"),
                           ("input()", "EOFError: EOF when reading a line"), ("x = bytearray(10**10)", "MemoryError"), ("\0", None), ("'\ud800'", None)):
        verdict = run_python(program)
        assert not verdict.passed and (verdict.error == error or not error and verdict.error), (program, verdict)


def test_nothing_is_inherited(kind, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "here")
    program = """
import os
print(sorted(os.environ), os.getcwd(), hash("a"))
for fd in range(300):
    try: print(fd, oct(os.fstat(fd).st_mode))
    except OSError: pass
"""
    verdict = run_python(program)
    assert verdict.output == run_python(program).output and "SECRET" not in verdict.output and "/scratch" in verdict.output, verdict
    # input and one more are /dev/null, output and errors a pipe
    assert [line.split()[1][:-3].removeprefix("0o") for line in verdict.output.splitlines()[1:]] == ["20", "10", "10", "20"], verdict


def test_programs_do_not_meet(kind):
    assert run_python("open('note', 'w').write('hello')").passed
    assert run_python("import os; assert os.listdir() == [], os.listdir()").passed


# ---- as an ordinary user, and without walls

def test_as_an_ordinary_user():
    if os.getuid() != 0: pytest.skip("these tests are an ordinary user's anyway")
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 12345, 12345)
        how = dict(user=12345, group=12345, extra_groups=[], cwd=folder, capture_output=True, text=True, timeout=120, env={
            "PATH": os.environ["PATH"], "HOME": folder, "TMPDIR": folder, "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(REPO), *(p for p in sys.path if p.endswith("site-packages"))])})
        for python in (sys.executable, "/usr/bin/python{}.{}".format(*sys.version_info)):
            try: reached = subprocess.run([python, "-c", "import nanochat.model.sandbox, pytest, psutil"], **how).returncode == 0
            except OSError: reached = False
            if reached: break
        else: pytest.skip("an ordinary user cannot reach this Python, and there is no other of its version")
        done = subprocess.run([python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(REPO/"tests"/"test_sandbox.py"),
                               "-k", "deed_has or process_stays or right_passes or fork or prints or kills or 10"], **how)
    if " passed" not in done.stdout and "on this machine" in done.stdout: pytest.skip(done.stdout[-500:])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture
def no_walls(monkeypatch):
    monkeypatch.setattr(sandbox, "_walls", lambda: (None, "bubblewrap is not installed; namespaces failed with 'unshare: Operation not permitted'"))
    monkeypatch.delenv("NANOCHAT_UNPROTECTED", raising=False)


def test_without_walls_it_refuses(no_walls):
    for call in (sandbox_kind, lambda: run_python("print(1)"), lambda: judge_function(RIGHT, "", "double"), lambda: judge_many([]), lambda: run_python("1", unprotected=False)):
        with pytest.raises(UserError, match="install bubblewrap.*unprotected=True or NANOCHAT_UNPROTECTED=1") as e: call()
        assert "\n" not in str(e.value) and "unshare: Operation not permitted" in str(e.value)


def test_unprotected_keeps_the_limits(no_walls, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_UNPROTECTED", "1")
    assert sandbox_kind() == "unprotected"
    monkeypatch.delenv("NANOCHAT_UNPROTECTED")
    assert "can read and change your files" in capsys.readouterr().out
    tests = "def check(candidate):\n    assert candidate(3) == 6"
    assert judge_function(RIGHT, tests, "double", unprotected=True).passed
    for program in (WRONG, FORGERIES["sys.exit"], FORGERIES["os._exit"], FORGERIES["equal to all"], FORGERIES["prints success"], ENDLESS["loop"], ENDLESS["10 GB of memory"], ENDLESS["1 GB of output"]):
        assert not judge_function(program, tests, "double", limits=QUICK, unprotected=True).passed, program
    name = f"group{os.getpid()}"[:15]
    assert not run_python(NAMED.format(name=name) + "os.fork()\ntime.sleep(60)", limits=QUICK, unprotected=True).passed
    assert gone(name)
    assert "can read" not in capsys.readouterr().out  # it is said once


def test_without_walls_a_deed_succeeds(no_walls, tmp_path):
    "Those that do no harm, so that it means something when they fail inside."
    for name in ("read /etc/passwd", "read a file of the user", "see the project", *(["read /etc through a link", "see other processes"] if sys.platform == "linux" else [])):
        verdict = attempt(name, tmp_path, unprotected=True)
        assert verdict.passed, (name, verdict)


def test_a_failing_way_is_named(monkeypatch, tmp_path):
    if sys.platform != "linux": pytest.skip("Linux alone has namespaces")
    (tmp_path/"bwrap").write_text("#!/bin/sh\necho bwrap: no permission >&2; exit 1\n")
    (tmp_path/"bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._walls.cache_clear()
    try: found, why = sandbox._walls()
    finally: sandbox._walls.cache_clear()
    assert found in (None, "namespaces") and "bubblewrap failed with 'bwrap: no permission'" in why


# ---- the calculator

def test_calculator():
    for text, value in (("12*(3+4)/2", "42"), ("12 * (3 + 4) / 2", "42"), ("0.1+0.2", "0.3"), ("2.5*4", "10"), ("7/2", "3.5"), ('"strawberry".count("r")', "3"),
                        ("-2**2", "-4"), ("2**-1", "0.5"), ("1e3", "1000"), ("1,000*2", "2000"), ("10 % 4", "2"), ("7 // 2", "3"), ("'a'.count('b')", "0"),
                        ("48000000000/4", "12000000000"), ("123456789.25+0.5", "123456789.75"), ("0*-1.0", "0"), ("10**17/3", "33333333333333333.33"), ("2//.2", "10"), ("2000 % .1", "0"),
                        ("10**18 - .01", "999999999999999999.99"), ("2**0.5", "1.414213562"), ("(2**0.5)**2", "2"), ("6.6e-34*3e8", "1.98e-25"), ("1e-7", "0.0000001"), ("'1,2'.count(',')*1,250", "1250")):
        assert calculator(text) == value, text


@pytest.mark.parametrize("seed", range(4))
def test_calculator_is_exact(seed):
    "Random expressions have the value that Python computes with fractions, and the text of a result is read back as the same number."
    rng = random.Random(seed)

    def expression(depth=0): # for the calculator, and for Python
        kind = rng.random()
        if depth == 4 or kind < 0.35:
            number = rng.choice((rng.randint(0, 30), f"{rng.randint(0, 99)}.{rng.randint(0, 99):02}", f"{rng.randint(1, 9)}e{rng.randint(-2, 3)}"))
            return str(number), f"F('{number}')"
        if kind < 0.55:
            mark, (text, code) = rng.choice(("-", "+", "()")), expression(depth + 1)
            return (f"({text})", f"({code})") if mark == "()" else (mark + text, mark + code)
        (a, x), (b, y), sign = expression(depth + 1), expression(depth + 1), rng.choice("+ - * / // %".split())
        return a + sign + b, x + sign + y

    known = 0
    for _ in range(3000):
        text, code = expression()
        try: value = eval(code, {"F": Fraction})
        except ZeroDivisionError: value = None
        found = calculator(text)
        if value is None: assert found is None, text
        elif found is not None:
            known += 1
            assert "e" not in found or abs(value) < Fraction(1, 10**9), (text, found)
            assert Fraction(found) == final_number(found) == value or abs(Fraction(found) - value) <= abs(value) / 10**9, (text, found, value)
            if value.denominator in (1, 2, 4, 5, 8, 10, 100): assert Fraction(found) == value, (text, found)
    assert known > 2000


def test_calculator_leaves_the_warnings_alone():
    "Threads that calculate at the same time change nothing that belongs to the whole process."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6) # threads take turns in the middle of a call
        try:
            with ThreadPoolExecutor(8) as pool: list(pool.map(calculator, ["5in 3", "1if 2else 3", "'\\d'.count('\\d')", "1 + 1"] * 500))
        finally: sys.setswitchinterval(interval)
        assert warnings.filters == filters and not caught


STRANGERS = ["9**9**9", "9" * 10_000, "1+" * 5000 + "1", "(" * 100 + "1" + ")" * 100, "(" * 50 + "1" + ")" * 50, "(" * 5000 + "1" + ")" * 5000, "-" * 5000 + "1", "[" * 199, "().__class__", "'a'.__class__", "'a'.upper()", "x", "x+1", "True", "None",
             "print(1)", "open('/etc/passwd')", "__import__('os')", "(lambda: 1)()", "[1, 2][0]", "{1: 2}", "1 if 1 else 2", "1 < 2", "1 and 2", "not 1", "~1", "1 | 2", "1 << 99", "f'{1}'", "x := 1", "1j", "'a' * 10**9", "'a' + 'b'",
             "'aaa'.count('a', 1)", "'a'.count(*['a'])", "'a'.count(1)", "'a'.count('a', end=1)", "b'a'.count(b'a')", "10**18 * 10", "10**64", "2**65", "2.0**1024", "1e308 * 10", "1/0", "0**-1", "1 % 0", "1 // 0", "(-8)**(1/3)", "nan", "inf",
             "await x", "yield 1", "1;2", "1\n2", "#", "\0", "", " ", "١+١x", "1__0", "0x", "…"]


@pytest.mark.parametrize("text", STRANGERS, ids=lambda text: text[:20])
def test_calculator_refuses(text):
    assert calculator(text) is None


def test_calculator_is_quick():
    for text in (*STRANGERS, "12*(3+4)/2", "((((((9**9)))))) % 7", "1+" * 99 + "1", "1**" * 60 + "1", "(10**17 + 1) ** 1", "99999999**2 // 7", '"' + "a" * 150 + '".count("a")'):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            calculator(text)
            times.append(time.perf_counter() - started)
        assert min(times) < 0.01, (text[:50], times)


# ---- at last: what all of this left in this process

def test_the_parent_stays_small(before):
    used = peak_memory()
    if used is not None: assert used - before["memory"] < 20, (before, used)
    assert psutil.Process().num_fds() <= before["files"] + 2

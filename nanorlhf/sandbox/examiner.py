"""Examines a program without trusting it: tests run in this process, the program in another, and only values pass.

Never imported by the trainer: `nanorlhf.rewards.code` gives this text to the sandbox, and on its stdin the program's
length, the program, and its tests. The program's process is forked before the tests are read, so of these it sees what
they call it with and nothing else; it cannot look into this process; what it sends makes plain values, so no object
whose `==` always says yes gets here; and verdicts leave by a file that it never had.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import marshal
import operator
import os
import pickle
import sys
import types

TYPE_CHECKING = False  # as in `typing`, whose import, with that of others that are not here, costs each exam 10 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PR_SET_DUMPABLE, ASYNC = 4, 0x80  # of a code object: its function is a coroutine's
PLAIN: tuple[Any, ...] = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice)
VALUES = {"builtins": {"bool", *(kind.__name__ for kind in PLAIN)}, "collections": {"deque"}, "decimal": {"Decimal"}}
VALUES |= {"fractions": {"Fraction"}, "datetime": {"date", "datetime", "time", "timedelta", "timezone"}}
ERRORS = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}


class UnposableError(BaseException):
    """A test hands over what cannot be sent, so that no program could pass it; no `except Exception` stops this."""


class GoneError(BaseException):
    """The program's process ended, or says what makes no sense."""


class Reference:
    """An object of the program, here by its number: what is done to it is done over there.

    It never equals a value, and computes with none: it could claim to be whatever it is compared with.
    """

    __slots__ = ("_key", "_peer")

    def __init__(self, peer: Peer, key: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_key", key)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask(self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask(getattr, self, name)

    __hash__ = object.__hash__


def forwarded(function: Callable[..., Any], alike: bool) -> Callable[..., Any]:
    """The method of Reference that has this done over there; `alike`: with another reference only."""

    def method(self: Reference, *others: Any) -> Any:
        if alike and not isinstance(others[0], Reference):
            return NotImplemented
        return self._peer.ask(function, self, *others)

    return method


for _function in (bool, iter, len, next, repr, setattr, str, operator.getitem, operator.setitem):
    setattr(Reference, f"__{_function.__name__}__", forwarded(_function, alike=False))
for _name in ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor"):
    setattr(Reference, f"__{_name.strip('_')}__", forwarded(getattr(operator, _name), alike=True))


class Peer:
    """The program's process, as the tests have it."""

    def __init__(self, source: bytes) -> None:
        (their_requests, requests), (replies, their_replies) = os.pipe(), os.pipe()
        if os.fork() == 0:
            alone(their_requests, their_replies)
            serve(source, os.fdopen(their_requests, "rb"), os.fdopen(their_replies, "wb"))
            os._exit(0)
        os.close(their_requests)
        os.close(their_replies)
        self.requests, self.replies, self.gone = os.fdopen(requests, "wb"), os.fdopen(replies, "rb"), False
        self.names: dict[str, Any] = {}
        self.modules: dict[str, str] = {}

    def begin(self) -> None:
        """Waits for the program to be loaded, and learns what it defines."""
        try:
            self.names, self.modules = map(dict, self.receive())
            self.gone = not all(type(text) is str for text in [*self.names, *self.modules, *self.modules.values()])
        except (GoneError, TypeError, ValueError):
            self.gone = True

    def ask(self, function: Any, *arguments: Any, **named: Any) -> Any:
        """Calls a function over there, and brings home what that did to its arguments."""
        packed = io.BytesIO()
        try:
            Questioner(packed).dump((function, arguments, named))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            given = "find_class" in str(error)  # a class of Python's, which the program gave
            raise (TypeError if given else UnposableError)(str(error)) from error
        if self.gone:
            raise GoneError
        try:
            self.requests.write(packed.getvalue())
            self.requests.flush()
            kinds, result, after = self.receive()
            for mine, theirs in zip([*arguments, *named.values()], after, strict=False):
                if type(mine) is type(theirs) and isinstance(mine, list | dict | set):
                    mine.clear()
                    (mine.extend if isinstance(mine, list) else mine.update)(theirs)
            error = None if kinds is None else next((ERRORS[kind] for kind in kinds if kind in ERRORS), RuntimeError)
        except (OSError, TypeError, ValueError) as failure:
            self.gone = True
            raise GoneError from failure
        if error is not None:
            raise error(result)
        return result

    def receive(self) -> Any:
        try:
            return Reader(self.replies, self).load()
        except Exception as error:
            self.gone = True
            raise GoneError from error


class Questioner(pickle.Pickler):
    """Anything that pickles, and references by their number."""

    def persistent_id(self, obj: Any) -> int | None:
        return obj._key if type(obj) is Reference else None  # noqa: SLF001  its other attributes are the program's


class Reader(pickle.Unpickler):
    """Makes values and references; a class never gets out of here, so that nothing can be set on one."""

    def __init__(self, file: Any, peer: Peer) -> None:
        super().__init__(file)
        self.peer = peer

    def persistent_load(self, pid: Any) -> Reference:
        return Reference(self.peer, int(pid))

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in VALUES.get(module_name, ()):
            raise pickle.UnpicklingError(global_name)
        kind = super().find_class(module_name, global_name)
        return lambda *arguments: kind(*arguments)  # noqa: PLW0108  not the class itself


class Answerer(pickle.Pickler):
    """Over there: values as they are, of subclasses the plain kind, arrays as lists, and all else as a number."""

    def __init__(self, file: Any, objects: list[Any]) -> None:
        super().__init__(file)
        self.objects = objects

    def persistent_id(self, obj: Any) -> int | None:
        kind = obj if isinstance(obj, type) else type(obj)  # with a value goes the name of its class
        if obj is None or isinstance(obj, PLAIN) or is_array(obj) or kind.__name__ in VALUES.get(kind.__module__, ()):
            return None
        self.objects.append(obj)
        return len(self.objects) - 1

    def reducer_override(self, obj: Any) -> Any:
        if is_array(obj):
            obj = obj.tolist()
            return type(obj), (obj,)
        for kind in PLAIN:
            if isinstance(obj, kind) and type(obj) is not kind:
                return kind, (kind(obj),)
        return NotImplemented


def is_array(value: Any) -> bool:
    return type(value).__module__ in {"numpy", "array"} and hasattr(value, "tolist")


def serve(source: bytes, requests: Any, replies: Any) -> None:
    """Runs in the program's process: loads the program, and does what is asked until no request comes."""
    objects: list[Any] = []

    class Listener(pickle.Unpickler):
        """Reads what the tests send, which is trusted."""

        def persistent_load(self, pid: Any) -> Any:
            return objects[pid]

    def send(message: Any) -> None:
        packed = io.BytesIO()
        Answerer(packed, objects).dump(message)
        replies.write(packed.getvalue())
        replies.flush()

    sys.modules["program"] = program = types.ModuleType("program")
    try:
        exec(compile(source, "program.py", "exec"), program.__dict__)  # noqa: S102  what a sandbox is for
    except BaseException:  # noqa: BLE001  a program that ends while it is loaded has nothing to be asked
        return
    names = {name: value for name, value in vars(program).items() if not name.startswith("__")}
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, types.ModuleType)}
    send(({name: value for name, value in names.items() if name not in modules}, modules))
    while requests.peek(1):
        try:
            function, arguments, named = Listener(requests).load()
            result = function(*arguments, **named)
            given = [*arguments, *named.values()]
            send((None, result, [value if isinstance(value, list | dict | set) else None for value in given]))
        except Exception as error:  # noqa: BLE001  the test shall see it, and may well want it
            send(([kind.__name__ for kind in type(error).__mro__], str(error), []))


def alone(*kept: int) -> None:
    """Nothing to read, nowhere to write, and no file but these."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in {0, 1, 2}.difference(kept):
        os.dup2(nowhere, descriptor)
    for descriptor in {*range(3, os.sysconf("SC_OPEN_MAX"))}.difference(kept):
        os.closerange(descriptor, descriptor + 1)  # which passes over those that are not open
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def examine(peer: Peer, texts: list[str], entry_point: str | None, say: Callable[[str], None]) -> None:
    """Runs tests that are Python, one after the other in one namespace, and says what came of each."""
    own = {n: v for n, v in peer.names.items() if n == entry_point or not hasattr(builtins, n)}  # not its `len`
    namespace: dict[str, Any] = own | {"__name__": "__tests__", "__builtins__": builtins}
    for name, module in peer.modules.items():
        known = module.partition(".")[0] in sys.stdlib_module_names
        if known and not hasattr(builtins, name) and name not in namespace:
            __import__(module)
            namespace[name] = sys.modules[module]
    sys.modules["solution"] = solution = types.ModuleType("solution")  # where some datasets' tests import from
    vars(solution).update(namespace)
    called: set[str] = set()
    for text in texts:
        result = attempt(peer, lambda text=text: exec(compile(text, "test", "exec"), namespace))  # noqa: S102
        cases = find_cases(namespace, entry_point, called) if result else []
        say(f"cases {len(cases) or 1}")
        for case in cases:
            say(f"{attempt(peer, case)}")
        if not cases:
            say(f"{result}")


def find_cases(namespace: dict[str, Any], entry_point: str | None, called: set[str]) -> list[Callable[[], Any]]:
    """The cases that a text defines, and that must be called: `test_...()`, those of classes, `check(entry_point)`."""
    cases: list[Callable[[], Any]] = []
    for name, value in [(name, value) for name, value in namespace.items() if name not in called]:
        test = name.startswith("test_") or name in {"test", "check"}
        if test and isinstance(value, types.FunctionType) and value.__globals__ is namespace:
            called.add(name)
            cases.append(lambda value=value: call(value, namespace, entry_point))
        elif isinstance(value, type) and value.__module__ == "__tests__":
            called.add(name)
            methods = [method for method in dir(value) if method.startswith("test")]
            cases += [lambda value=value, m=m: call(bound(value, m), namespace, entry_point) for m in methods]
    return cases


def bound(kind: type, method: str) -> Any:
    """A test of a class: unittest's with its set-up, or one by itself."""
    unittest: Any = sys.modules.get("unittest")
    return kind(method).debug if unittest and issubclass(kind, unittest.TestCase) else getattr(kind(), method)


def call(function: Any, namespace: dict[str, Any], entry_point: str | None) -> None:
    """Calls a test, with the function that is tested if it takes one."""
    wanted = function.__code__.co_argcount - len(function.__defaults__ or ()) - isinstance(function, types.MethodType)
    if wanted > (function.__name__ == "check" and entry_point is not None) or function.__code__.co_flags & ASYNC:
        raise UnposableError("nobody says what to test, or nobody awaits it")
    function(*[eval(entry_point, namespace) for _ in range(wanted) if entry_point is not None])  # noqa: S307


def attempt(peer: Peer, act: Callable[[], Any]) -> bool | None:
    """Whether it goes through; None if that says nothing about the program."""
    try:
        act()
    except UnposableError:
        return None
    except (SyntaxError, ModuleNotFoundError) as error:  # one that the program raised has neither file nor name
        return None if getattr(error, "filename", "") == "test" or getattr(error, "name", "") else False
    except BaseException:  # noqa: BLE001  whatever a test raises
        return False
    return not peer.gone


def answer(source: bytes, stdin: str, largest: int) -> tuple[int, bytes]:
    """The exit code of the program on this input, and what it writes."""
    given = os.memfd_create("stdin")
    os.pwrite(given, stdin.encode(errors="replace"), 0)
    written, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(given, 0)
        os.dup2(end, 1)
        alone(0, 1)
        sys.modules["__main__"] = program = types.ModuleType("__main__")
        exec(compile(source, "program.py", "exec"), program.__dict__)  # noqa: S102  what a sandbox is for
        sys.exit()
    os.close(given)
    os.close(end)
    with os.fdopen(written, "rb") as file:
        output = file.read(largest)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def take(count: int) -> bytes:
    """So many bytes of stdin and not one more, for what comes next is not for those that are forked now."""
    data = b""
    while len(data) < count:
        data += os.read(0, count - len(data))
    return data


def main() -> None:
    """Reads a program, starts it, and only then reads the tests."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # only root can look into this process now
    verdicts = os.dup(1)

    def say(line: str) -> None:
        os.write(verdicts, line.encode() + b"\n")

    kind, length, size = take(1), int(take(12)), int(take(12))
    source = take(length)
    peer = Peer(source) if kind == b"t" else None
    tests = marshal.loads(take(size))  # noqa: S302  from the trainer
    if peer is None:
        for stdin in tests["inputs"]:
            status, output = answer(source, stdin, tests["largest"])
            say(f"{status} {output.hex()}")
    else:
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        peer.begin()
        examine(peer, tests["texts"], tests["entry_point"], say)


if __name__ == "__main__":
    main()

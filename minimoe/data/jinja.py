"""Runs a chat template, a Jinja program that others wrote: in Jinja's sandbox, with bounds on its steps and on the text that it makes.

The sandbox keeps a program from everything but the values it is given. What it lacks is added here: each round of a loop and each call of
a macro is counted, and whatever makes a text or a list longer (+, *, ~, %, padding) is refused beyond a bound. Needs the extra `chat`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from minimoe.untrusted import Malformed

MOST_STEPS = 50_000  # rounds of loops and calls of macros
MOST_TEXT = 20_000_000  # characters
PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"}  # a number makes their result as long as it says
FILTERS = {"center", "format", "wordwrap", "indent", "batch", "slice"}


class TooMuch(Exception):
    """A template that does more than a chat needs."""


def compiled(source: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the function that renders a template with its variables. Both raise `Malformed`: for what is no template, or fails."""
    environment = _Environment()
    try:
        template = environment.from_string(_Counted().visit(environment.parse(source)))
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise Malformed(f"not a template: {_reason(error)}") from None

    def render(given: Mapping[str, Any]) -> str:
        environment.steps = 0
        pieces, size = [], 0
        try:
            for piece in template.generate(**given):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_TEXT:
                    raise TooMuch(f"more than {MOST_TEXT:,} characters")
        except Exception as error:  # whatever the program does wrong
            raise Malformed(f"fails: {_reason(error)}") from None
        return "".join(pieces)

    return render


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with what transformers gives to templates, and with the bounds. There is no date: it would change the text each day."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.steps = 0
        self.filters = {key: value for key, value in self.filters.items() if key not in FILTERS}
        self.filters |= {"tojson": _to_json, "join": _join, "replace": _replace}
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise, _STEP: self._step, _JOINED: _joined}

    def _step(self) -> str:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TooMuch(f"more than {MOST_STEPS:,} steps")
        return ""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        bounded: Any = {"join": _join, "replace": _replace}.get(getattr(obj, "__name__", ""))
        owner = getattr(obj, "__self__", None)
        if bounded is not None and isinstance(owner, str):
            return bounded(*((args[0], owner) if bounded is _join else (owner, *args)))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TooMuch(f"the operator {operator}")
        if operator == "*" and sizes:
            times = left if isinstance(left, int) else right
            sizes = [sizes[0] * times] if isinstance(times, int) else sizes
        if sum(sizes) > MOST_TEXT:
            raise TooMuch(f"a value of more than {MOST_TEXT:,} characters")
        return super().call_binop(context, operator, left, right)


_STEP, _JOINED = "minimoe_step", "minimoe_joined"  # names that the programs are given


class _Counted(NodeTransformer):
    """Puts a call that counts at the beginning of each loop and macro, and one that is bounded in place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.Output([call], lineno=node.lineno))
        found: nodes.Node = node
        return found

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_JOINED, "load"), list(node.nodes), [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark what the assistant writes; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _joined(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MOST_TEXT:
        raise TooMuch(f"a value of more than {MOST_TEXT:,} characters")
    return "".join(texts)


def _join(values: Any, separator: Any = "", attribute: str | None = None) -> str:
    texts = [str(value if attribute is None else value[attribute]) for value in values]
    return _joined(*([part for text in texts for part in (str(separator), text)][1:]))


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    if len(text) + (text.count(old) if old else len(text) + 1) * len(new) > MOST_TEXT:
        raise TooMuch(f"a value of more than {MOST_TEXT:,} characters")
    return str(text).replace(old, new, -1 if count is None else count)


def _raise(message: Any = "") -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=min(indent, 8) if isinstance(indent, int) else None)

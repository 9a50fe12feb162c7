"""GroupNorm followed by SiLU in networks that nobody has described: in an `nn.Sequential`, and in
methods whose source shows that nothing but a SiLU sees what a normalisation returns."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.foreign_blocks import (
    NORM_NAMES,
    activates,
    dropped,
    known_block,
    norm_obstacle,
    normalise,
)


def is_norm(module: Any) -> bool:
    """Whether a module is a group normalisation that the fused operation stands for, without SiLU."""
    if not isinstance(module, nn.Module):
        return False
    block = known_block(module)
    is_known = block is not None and block.class_name in NORM_NAMES
    return is_known and not norm_obstacle(module) and not activates(module)


def is_silu(module: Any) -> bool:
    return type(module) is nn.SiLU


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls."""
    return any(
        getattr(module, f"_{kind}")
        for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    )


def norm_silu(norm: Any, act: Callable, x: torch.Tensor) -> torch.Tensor:
    """act(norm(x)), where act is SiLU."""
    return normalise(x, norm, silu=True) if x.ndim == 4 else act(norm(x))


# ---- nn.Sequential ------------------------------------------------------------------------------


def sequential_runs(sequence: nn.Sequential) -> dict[int, int]:
    """Positions of GroupNorm, SiLU and perhaps Dropout in a row -> how many of them there are."""
    modules = list(sequence)
    runs = {}
    for i, (norm, act) in enumerate(itertools.pairwise(modules)):
        if is_norm(norm) and is_silu(act) and not has_hooks(norm) and not has_hooks(act):
            drops = len(modules) > i + 2 and type(modules[i + 2]) is nn.Dropout
            runs[i] = 3 if drops and not has_hooks(modules[i + 2]) else 2
    return runs


def sequential_forward(self: Any, x: Any) -> Any:
    """The forward method of an `nn.Sequential` whose runs are one operation each."""
    modules, i = list(self), 0
    while i < len(modules):
        length = self._tcm_fast_runs.get(i, 0)
        module = modules[i]
        if length and is_norm(module) and isinstance(x, torch.Tensor) and x.ndim == 4:
            drops = {}
            if length == 3 and 0 <= modules[i + 2].p < 1:
                drops = dropped(modules[i + 2], x, modules[i + 2].p)
                i += 1
            x = normalise(x, module, silu=True, **drops)
            i += 2
        else:
            x = module(x)
            i += 1
    return x


# ---- methods ------------------------------------------------------------------------------------


def rewritten_methods(module: nn.Module) -> tuple[dict[str, Any], list[str], str]:
    """Methods of a module's class with each provable norm-then-SiLU as one call, by their names; the
    names of the normalisations; and the methods' source.

    Proven is what the source says: `self.act(self.norm(x))` with SiLU for the act, and an assignment
    of `self.norm(x)` to a local name that the very next statement gives to a SiLU alone and then
    assigns anew or leaves behind in a `return`.
    """
    methods: dict[str, Any] = {}
    source = ""
    norms: set[str] = set()
    known: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__):
        known |= {} if kind.__module__.partition(".")[0] == "torch" else vars(kind)
    for name, function in known.items():
        if not isinstance(function, types.FunctionType) or name.startswith("__"):
            continue
        tree = _parse(function)
        if tree is None:
            continue
        fuser = _Fuser(module, function)
        tree = fuser.visit(tree)
        if fuser.norms:
            methods[name] = _compile(tree, function)
            source += ast.unparse(tree) + "\n"
            norms |= fuser.norms
    return methods, sorted(norms), source


def _parse(function: types.FunctionType) -> ast.FunctionDef | None:
    """The source of a method; None where there is none, or decorators have changed it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or not node.args.args:
        return None
    private = re.compile(r"__\w*[^_]_?")  # such names mean something else outside their class
    names = (getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node))
    return None if any(map(private.fullmatch, names)) else node


def _compile(tree: ast.FunctionDef, function: types.FunctionType) -> types.FunctionType:
    """A method from its changed source, in the globals, closure and defaults of the old one."""
    free = function.__code__.co_freevars
    tree.args.defaults, tree.args.kw_defaults = [], [None] * len(tree.args.kwonlyargs)
    tree.returns = None
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    outer = ast.parse(f"def outer({', '.join(free)}):\n    pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [tree]  # so that the names of the closure, __class__ among them, are free in it
    whole = ast.fix_missing_locations(ast.Module([outer], []))
    code = compile(whole, function.__code__.co_filename, "exec")
    for name in ("outer", tree.name):
        code = next(
            c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name
        )
    cells = dict(zip(free, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    return made


class _Fuser(ast.NodeTransformer):
    """Rewrites one method of one module; `norms` are the normalisations that it found."""

    def __init__(self, module: nn.Module, function: types.FunctionType):
        self.module, self.function = module, function
        self.own = function.__code__.co_varnames[0]  # "self"
        self.norms: set[str] = set()
        self.depth = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.depth += 1  # inner functions have local names of their own
        return self.generic_visit(node) if self.depth == 1 else node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    # Statements: v = self.norm(x), then v and SiLU.

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                for first, second in itertools.pairwise(body):
                    self._join(first, second)
        return super().generic_visit(node)

    def _join(self, first: ast.stmt, second: ast.stmt) -> None:
        """Move the SiLU of `second` into `first` where it alone consumes what `first` assigns."""
        if not (isinstance(first, ast.Assign) and self._norm(first.value)):
            return
        name = first.targets[0]
        if len(first.targets) != 1 or not isinstance(name, ast.Name) or self._is_shared(name.id):
            return
        leaves = isinstance(second, ast.Return) or (
            isinstance(second, ast.Assign)
            and [ast.dump(t) for t in second.targets] == [ast.dump(name)]
        )
        if not leaves or second.value is None:  # type: ignore[attr-defined]
            return
        uses = [n for n in ast.walk(second) if isinstance(n, ast.Name) and n.id == name.id]
        calls = [
            n
            for n in ast.walk(second)
            if self._act(n) and isinstance(n.args[0], ast.Name) and n.args[0].id == name.id  # type: ignore[attr-defined]
        ]
        reads = [n for n in uses if isinstance(n.ctx, ast.Load)]
        scopes = (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)
        if (
            len(reads) != 1
            or len(calls) != 1
            or any(isinstance(n, scopes) for n in ast.walk(second))
        ):
            return
        call = calls[0]
        assert isinstance(call, ast.Call)
        first.value = self._fused(first.value, call)
        _Replace(call, call.args[0]).visit(second)

    def _is_shared(self, name: str) -> bool:
        """Whether an inner function, or everybody, sees a local name."""
        code = self.function.__code__
        return name in code.co_cellvars or name not in code.co_varnames

    # Expressions: act(self.norm(x)).

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self._act(node) and self._norm(node.args[0]):
            fused = self._fused(node.args[0], node)
            fused.args[2:] = [self.visit(argument) for argument in fused.args[2:]]
            return fused
        return self.generic_visit(node)

    def _fused(self, norm: ast.expr, act: ast.Call) -> ast.Call:
        assert isinstance(norm, ast.Call)
        assert isinstance(norm.func, ast.Attribute)
        self.norms.add(norm.func.attr)
        function = ast.Attribute(ast.Name(self.own, ast.Load()), "_tcm_fast_norm_silu", ast.Load())
        return ast.Call(function, [norm.func, act.func, *norm.args], [])

    def _attribute(self, node: ast.AST) -> Any:
        """The sub-module that `self.name` stands for, or None."""
        is_own = (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == self.own
        )
        module = getattr(self.module, node.attr, None) if is_own else None  # type: ignore[attr-defined]
        return module if isinstance(module, nn.Module) and not has_hooks(module) else None

    def _norm(self, node: ast.AST) -> bool:
        """Whether a node is the call of a normalisation with one argument."""
        is_call = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
        starred = is_call and isinstance(node.args[0], ast.Starred)  # type: ignore[attr-defined]
        return is_call and not starred and is_norm(self._attribute(node.func))  # type: ignore[attr-defined]

    def _act(self, node: ast.AST) -> bool:
        """Whether a node is the call of a SiLU module, or of torch's function."""
        if not isinstance(node, ast.Call) or len(node.args) != 1:
            return False
        if any(keyword.arg != "inplace" for keyword in node.keywords):
            return False
        module = self._attribute(node.func)
        if module is not None:
            return is_silu(module) and not node.keywords
        return self._global(node.func) is F.silu

    def _global(self, node: ast.AST) -> Any:
        """What a dotted name stands for that no local name hides, or None."""
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        code = self.function.__code__
        hidden = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        if not isinstance(node, ast.Name) or node.id in hidden:
            return None
        return self.function.__globals__.get(node.id)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().visit(node)

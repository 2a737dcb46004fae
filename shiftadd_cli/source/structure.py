"""Finds blocks and linear layers by structure; no model family is known by name here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.experts import SplitExperts
from shiftadd_cli.source.linear import linear_sizes
from shiftadd_cli.source.skeleton import tied_groups
from shiftadd_cli.source.weight_reads import weights_read_by_others

# Why a convolution outside the blocks is kept: it is not a linear layer but turns pixels into hidden states.
PATCH_EMBEDDING = "patch embedding"
# The linear layer after the blocks that gives the class scores of a vision model.
CLASSIFIER = "classifier"

_UNKNOWN = "not a linear layer"
_OUTSIDE = "outside the blocks"
_READ = "weight read by other code"


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer inside a block.

    `name` is its full module path, `kind` its path inside block number `block`. `transposed` is True where the stored
    weight is [in_features, out_features] (transformers' Conv1D) instead of [out_features, in_features]. `experts` is
    set for a linear of an expert: the path of its mixture inside the block. Then the next part of `kind` is the number
    of the expert, and the linear reads only some tokens. `copies` are the linears of later blocks that share its
    weight, as block number and path inside the block.
    """

    name: str
    kind: str
    block: int
    out_features: int
    in_features: int
    has_bias: bool
    transposed: bool
    experts: str | None = None
    copies: tuple[tuple[int, str], ...] = ()

    def turned(self, weight: Tensor) -> Tensor:
        """A stored weight as `[out, in]`, and the other way round; a view."""
        return weight.T if self.transposed else weight

    def matrix(self, block: nn.Module) -> Tensor:
        """The weight of this linear in its block as `[out, in]`, detached, in the dtype it has there."""
        return self.turned(block.get_submodule(self.kind).get_parameter("weight").detach())


@dataclass(frozen=True)
class Structure:
    """Where the parts of a model are.

    `block_list` is the name of the ModuleList of blocks, or of stages that hold them. `blocks` are the full names of
    the blocks in running order, where each block reads the output of the one before. `kept` pairs the name of every
    other module that has parameters of its own with the reason it is kept. `outside` are the prefixes that
    `Source.materialise` needs to run everything except the blocks. `tied` are groups of names of one parameter. `share`
    is the fraction of the weights of linear and similar layers that is in `linears`; heads, embeddings, routers and
    skipped modules do not count.
    """

    block_list: str
    blocks: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    kept: tuple[tuple[str, str], ...]
    outside: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    share: float = 1.0

    def shared_in(self, block: int) -> dict[str, str]:
        """Parameters of a block that are stored elsewhere, and the names that they are stored under."""
        within = f"{self.blocks[block]}."
        return {name: group[0] for group in self.tied for name in group[1:] if name.startswith(within)}


def find_structure(model: nn.Module, skip: Sequence[str] = (), *, allow_partial: bool = False) -> Structure:
    """Blocks, linears and everything else of a decoder or a vision model, which may be on meta.

    The blocks are the elements of the `nn.ModuleList` in the text decoder with the most weights in linear layers. A
    list of uniform elements is preferred if it holds at least half as many. The elements may be stages, which hold only
    such a list and at most one module that leads to the next stage (as in hierarchical vision models, where width and
    number of tokens change there). Then the elements of the inner lists are the blocks, and so are the modules between
    stages. `skip` are glob patterns on full module names; a linear is skipped if it or a module around it matches.
    `allow_partial`: allow that only the smaller part of the model can be compressed.

    Raises:
        SourceError: there are no blocks of linear layers, less than half of the weights are in linear layers of the
            blocks (experts of an unknown form, see `source.experts`), or a pattern matches nothing.
    """
    block_list, elements = _find_blocks(model)
    blocks = tuple(f"{block_list}.{leaf}" for leaf in _in_stages(elements))
    tied = tied_groups(model)
    shared = {name.rpartition(".")[0]: group for group in tied for name in group}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears: list[LinearSpec] = []
    others: list[tuple[str, str]] = []
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    routers = {router for name, module in mixtures.items() for router in _routers(model, name, module)}
    # Weights that stay uncompressed although the user did not ask for it.
    missed: dict[str, int] = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        number = next((i for i, block in enumerate(blocks) if name == block or name.startswith(block + ".")), None)
        sizes = linear_sizes(module)
        if number is None:
            others.append((name, _reason_outside(model, name, module, head)))
            if sizes is not None and others[-1][1] == _OUTSIDE and not matching_pattern(name, skip):
                missed[name] = sizes[0] * sizes[1]
        elif pattern := matching_pattern(name, skip):
            others.append((name, f"skipped by {pattern}"))
        elif name in routers:
            others.append((name, "router"))
        elif sizes is None:
            others.append((name, _reason(module, head, _UNKNOWN)))
            if others[-1][1] == _UNKNOWN and not _is_convolution(module):
                missed[name] = sum(own.numel() for own in module.parameters(recurse=False) if own.ndim > 1)
        elif name in shared and (copies := _copies(model, blocks, tied, name)) is None:
            others.append((name, "shares its weight with another module"))
            missed[name] = sizes[0] * sizes[1]
        elif name in shared and f"{name}.weight" != shared[name][0]:
            others.append((name, "copy of an earlier linear layer"))
        else:
            out_features, in_features, transposed = sizes
            has_bias = getattr(module, "bias", None) is not None
            kind = name.removeprefix(blocks[number] + ".")
            mixture = next((outer for outer in _above(name) if outer in mixtures), None)
            experts = None if mixture is None else mixture.removeprefix(blocks[number] + ".")
            linears.append(
                LinearSpec(
                    name,
                    kind,
                    number,
                    out_features,
                    in_features,
                    has_bias,
                    transposed,
                    experts,
                    copies or () if name in shared else (),
                )
            )
    read = weights_read_by_others(model, tuple(spec.name for spec in linears))
    others += [(name, _READ) for name in read]
    missed |= {spec.name: spec.out_features * spec.in_features for spec in linears if spec.name in read}
    linears = [spec for spec in linears if spec.name not in read]
    _refuse(model, linears, skip)
    compressed = sum(spec.out_features * spec.in_features for spec in linears)
    share = compressed / (compressed + sum(missed.values()))
    if not allow_partial:
        _refuse_partial(model, share, missed, dict(others))
    return Structure(block_list, blocks, tuple(linears), tuple(others), tuple(_outside(model, "", blocks)), tied, share)


def _copies(
    model: nn.Module, blocks: Sequence[str], tied: Sequence[tuple[str, ...]], name: str
) -> tuple[tuple[int, str], ...] | None:
    """The linears that share all parameters with the linear `name`, without the first one, as block number and path
    inside the block; None if they do not match, or the first one is not in the earliest block."""
    groups = [group for group in tied if any(member.rpartition(".")[0] == name for member in group)]
    members = [tuple(member.rpartition(".")[0] for member in group) for group in groups]
    if len(set(members)) != 1 or len(groups) != len(list(model.get_submodule(name).parameters(recurse=False))):
        return None
    positions = []
    for member in members[0]:
        number = next((i for i, block in enumerate(blocks) if member.startswith(block + ".")), None)
        if number is None or linear_sizes(model.get_submodule(member)) is None:
            return None
        positions.append((number, member.removeprefix(blocks[number] + ".")))
    return tuple(positions[1:]) if positions[0][0] < min(number for number, _ in positions[1:]) else None


def _find_blocks(model: nn.Module) -> tuple[str, list[tuple[str, nn.Module]]]:
    decoder = getattr(model, "get_decoder", lambda: model)()
    # `get_decoder` may return the head. Then the blocks are searched in the entire model.
    for root in (next((name for name, module in model.named_modules() if module is decoder), ""), ""):
        largest: tuple[int, str, Any] = (0, "", None)
        uniform = largest
        for name, module in model.get_submodule(root).named_modules():
            if not isinstance(module, nn.ModuleList):
                continue
            weights = sum(sizes[0] * sizes[1] for part in module.modules() if (sizes := linear_sizes(part)) is not None)
            if weights > largest[0]:
                largest = (weights, name, module)
            if weights > uniform[0] and _is_uniform(module):
                uniform = (weights, name, module)
        # Elements of different kinds may be blocks (Jamba), or stages where only some hold blocks (MobileViT).
        _, name, module = uniform if uniform[0] >= largest[0] / 2 else largest
        if module is not None:
            return ".".join(part for part in (root, name) if part), list(module.named_children())
    raise SourceError(
        f"{type(model).__name__} has no blocks to compress: looked for a ModuleList whose elements hold linear layers."
    )


def _in_stages(elements: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Names of the blocks below their list: the elements, or the blocks inside them if all elements are stages."""
    names: list[str] = []
    for leaf, element in elements:
        inner = _stage(element)
        if inner is None:
            return [name for name, _ in elements]
        names += [f"{leaf}.{name}" for name in inner]
    return names


def _stage(module: nn.Module) -> list[str] | None:
    """Names of the blocks of a stage, in order; None for a module that is not a stage."""
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    lists = [name for name, child in children if isinstance(child, nn.ModuleList)]
    if any(True for _ in module.parameters(recurse=False)) or len(lists) != 1 or len(children) > 2:
        return None
    blocks: list[str] = []
    for name, child in children:
        if not isinstance(child, nn.ModuleList):
            blocks.append(name)
        elif not _is_uniform(child) or not any(linear_sizes(part) for part in child.modules()):
            return None
        else:
            blocks += [f"{name}.{leaf}" for leaf, _ in child.named_children()]
    return blocks


def _is_uniform(elements: nn.ModuleList) -> bool:
    layouts = {tuple(n for n, part in element.named_modules() if linear_sizes(part)) for element in elements}
    return len({type(element) for element in elements}) == 1 or len(layouts) == 1


def matching_pattern(name: str, patterns: Sequence[str]) -> str | None:
    """The first of the glob `patterns` that matches the module `name` or a module around it; None if none does."""
    prefixes = [name, *_above(name)]
    return next((pattern for pattern in patterns if any(fnmatchcase(prefix, pattern) for prefix in prefixes)), None)


def _above(name: str) -> list[str]:
    """Names of the modules around the module `name`, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _routers(model: nn.Module, name: str, experts: SplitExperts) -> Iterator[str]:
    """Names of the routers next to the experts `name`: modules whose only matrix has one row per expert, or a single
    row for the part that all tokens share. They are small, and wrong routing is worse than any error of a weight."""
    parent = name.rpartition(".")[0]
    for leaf, child in model.get_submodule(parent).named_children():
        matrices = [
            (path, own)
            for path, part in child.named_modules()
            for own in part.parameters(recurse=False)
            if own.ndim > 1 and child is not experts
        ]
        if len(matrices) == 1 and matrices[0][1].shape[0] in (experts.num_experts, 1):
            yield ".".join(part for part in (parent, leaf, matrices[0][0]) if part)


def _reason(module: nn.Module, head: nn.Module | None, otherwise: str) -> str:
    if module is head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # A norm's own parameters are all vectors. transformers itself also recognises norms by class name.
    if "norm" in type(module).__name__.lower() and all(own.ndim == 1 for own in module.parameters(recurse=False)):
        return "norm"
    return otherwise


def _reason_outside(model: nn.Module, name: str, module: nn.Module, head: nn.Module | None) -> str:
    """Why a module outside the blocks is kept."""
    if _is_convolution(module):
        return PATCH_EMBEDDING
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if head is None and "." not in name and (sizes := linear_sizes(module)) is not None and sizes[0] == labels:
        return CLASSIFIER
    return _reason(module, head, _OUTSIDE)


def _refuse(model: nn.Module, linears: Sequence[LinearSpec], skip: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SourceError(
                f"The skip pattern {pattern!r} matches no module of {type(model).__name__}; their names look like "
                f"{names[-1]!r}."
            )
    if not linears:
        cure = "skip fewer modules" if skip else "its architecture is not supported"
        raise SourceError(f"No linear layer of {type(model).__name__} can be compressed; {cure}.")


def _refuse_partial(model: nn.Module, share: float, missed: Mapping[str, int], reasons: Mapping[str, str]) -> None:
    """Refuse to compress too little, for example only attention because the form of the experts is unknown."""
    if share >= 0.5:
        return
    largest = max(missed, key=lambda name: missed[name])
    raise SourceError(
        f"Only {math.floor(100 * share)}% of the weights of {type(model).__name__} would be compressed (the largest "
        f"part left as it is: {largest}, a {type(model.get_submodule(largest)).__name__}, {reasons[largest]}); give "
        "`allow_partial=True` to compress no more than that."
    )


def _outside(module: nn.Module, name: str, blocks: Sequence[str]) -> Iterator[str]:
    """As few names as possible that cover all tensors at and below `module` except the blocks."""
    for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield f"{name}.{leaf}" if name else leaf
    for leaf, child in module.named_children():
        full = f"{name}.{leaf}" if name else leaf
        if full in blocks:
            continue
        if any(block.startswith(full + ".") for block in blocks):
            yield from _outside(child, full, blocks)
        elif any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            yield full

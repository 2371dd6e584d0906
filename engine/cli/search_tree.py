"""A search drawn for a terminal: what was weighed at every token, as trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from pagefork.cli.text import label

TOKEN_WIDTH, TAIL_WIDTH = 16, 24
FATES = {"kept": ("+", "green"), "finished": ("*", "bold cyan"), "pruned": ("-", "dim")}
CHOSEN = "bold"
LEGENDS = {
    "beam": "+ kept  * finished  - pruned; log-prob of the token, of the whole output; > leads to the best output",
    "contrastive": "> chosen; probability, similarity to what came before, score",
    "mcts": "> most visited  * drawn instead; visits, prior, value",
}

Document = dict[str, Any]
Step = dict[str, Any]


def draw(document: Document, top: int, depth: int) -> None:
    """Print the legend, a tree per step and the outputs. `document` is that of `search.document`."""
    console = Console(highlight=False, markup=False, emoji=False)
    strategy = document["strategy"]
    console.print(f"{strategy} after {label(document['prompt'] or '')}", soft_wrap=True)
    console.print(LEGENDS[strategy], style="dim")
    trees: dict[str, Callable[[Document, int, int], Iterator[Tree]]]
    trees = {"beam": _beam, "contrastive": _contrastive, "mcts": _mcts}
    for tree in trees[strategy](document, top, depth):
        console.print(tree)
    if not document["complete"]:
        console.print("Later steps are not in the trace, which has grown too long.")
    for output in document["outputs"]:
        score = "" if output["score"] is None else f" score {output['score']:.3f},"
        console.print(f"[{output['index'] + 1}]{score} {output['finish_reason']}: {label(output['text'], 10**6)}", soft_wrap=True)
    usage = document["usage"]
    console.print(
        f"{usage['forward_tokens']} tokens computed, {usage['forks']} forks, {usage['blocks_copied']} blocks copied, "
        f"{usage['blocks_freed']} freed; {usage['shared_block_ratio']:.0%} of the blocks were shared",
        style="dim",
    )


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _token(document: Document, token: int, width: int = TOKEN_WIDTH) -> str:
    return label(document["texts"].get(str(token), ""), width).ljust(width)


def _number(value: float | None) -> str:
    """JSON has no infinity; here only a probability of 0 has that log."""
    return "   -inf" if value is None else f"{value:7.3f}"


def _beam(document: Document, top: int, depth: int) -> Iterator[Tree]:
    best = document["outputs"][0]["token_ids"] if document["outputs"] else []
    texts: list[str] = []
    leading = {-1}  # candidates of the last step whose tokens so far are those of the best output
    for step in document["steps"]:
        at = step["step"] - 1
        parents = step["parent"]
        ends = [texts[parent] if 0 <= parent < len(texts) else "" for parent in parents]
        ahead = {
            i
            for i, token in enumerate(step["token"])
            if parents[i] in leading and at < len(best) and token == best[at] and step["fate"][i] != "pruned"
        }
        tree = Tree(_line(f"token {step['step']}"))
        groups = sorted(set(step["group"]))
        for group in groups:
            branch = tree.add(_line(f"group {group + 1}")) if len(groups) > 1 else tree
            members = [i for i in range(len(parents)) if step["group"][i] == group]
            for i in members[:top]:
                sign, style = FATES[step["fate"][i]]
                mark = ">" if i in ahead else " "
                numbers = f"{_number(step['logprob'][i])} {_number(step['cumulative'][i])}"
                text = f"{mark}{sign} {_token(document, step['token'][i])} {numbers}  {_tail(ends[i])}"
                branch.add(_line(text, f"{CHOSEN} {style}" if i in ahead else style))
            if rest := Counter(step["fate"][i] for i in members[top:]):
                branch.add(_line(f"   {', '.join(f'{count} more {fate}' for fate, count in rest.items())}", "dim"))
        texts = [
            (end + document["texts"].get(str(token), ""))[-2 * TAIL_WIDTH :]
            for end, token in zip(ends, step["token"], strict=True)
        ]
        leading = ahead
        yield tree


def _tail(text: str) -> str:
    """The end of what a candidate goes on from."""
    quoted = label(text, 10**6)
    if not text:
        return "first"
    return f"after {quoted if len(quoted) <= TAIL_WIDTH else '…' + quoted[1 - TAIL_WIDTH :]}"


def _contrastive(document: Document, top: int, depth: int) -> Iterator[Tree]:
    for number, step in enumerate(document["steps"], 1):
        tree = Tree(_line(f"token {number}: alpha {step['alpha']:.3g}, confidence {step['confidence']:.3f}"))
        tokens = step["token"]
        shown = [i for i in range(len(tokens)) if i < top or i == step["chosen"]]
        for i in shown:
            numbers = " ".join(_number(step[name][i]) for name in ("p", "similarity", "score"))
            is_chosen = i == step["chosen"]
            text = f"{'>' if is_chosen else ' '} {_token(document, tokens[i])} {numbers}"
            tree.add(_line(text, f"{CHOSEN} green" if is_chosen else ""))
        if len(shown) < len(tokens):
            tree.add(_line(f"  {len(tokens) - len(shown)} more", "dim"))
        yield tree


def _mcts(document: Document, top: int, depth: int) -> Iterator[Tree]:
    several = len(document["outputs"]) > 1
    count: Counter[int] = Counter()
    for step in document["steps"]:
        count[step["output"]] += 1
        children: dict[int, list[int]] = {}
        for entry, parent in enumerate(step["parent"]):
            children.setdefault(parent, []).append(entry)
        place = f"output {step['output'] + 1}, " if several else ""
        emitted = _token(document, step["token"][step["chosen"]]).rstrip()
        visits = step["visits"]
        tree = Tree(_line(f"{place}token {count[step['output']]}: {emitted}, {visits[step['chosen']]} of {visits[0]} visits"))
        _Visited(document, step, children, top).grow(tree, 0, depth, is_best=True)
        yield tree


class _Visited(NamedTuple):
    """The tree of one emitted token."""

    document: Document
    step: Step
    children: dict[int, list[int]]  # of each entry
    top: int

    def grow(self, tree: Tree, entry: int, depth: int, *, is_best: bool) -> None:
        """Add `depth` levels below an entry: at most `top` children of each node, the most visited, and the emitted one."""
        visits, chosen = self.step["visits"], self.step["chosen"]
        ranked = sorted(self.children.get(entry, ()), key=lambda child: (-visits[child], child != chosen, child))
        shown = [child for place, child in enumerate(ranked) if place < self.top or child == chosen]
        for child in shown:
            leads = is_best and child == ranked[0] and visits[child] > 0
            mark = ">" if leads else "*" if child == chosen else " "
            value = _number(self.step["value"][child]) if visits[child] else "      -"
            numbers = f"{visits[child]:5d} {_number(self.step['prior'][child])} {value}"
            style = f"{CHOSEN} green" if leads else "" if visits[child] else "dim"
            branch = tree.add(_line(f"{mark} {_token(self.document, self.step['token'][child])} {numbers}", style))
            if depth > 1:
                self.grow(branch, child, depth - 1, is_best=leads)
        if rest := [child for child in ranked if child not in shown]:
            tree.add(_line(f"  {len(rest)} more, {sum(visits[child] for child in rest)} visits", "dim"))

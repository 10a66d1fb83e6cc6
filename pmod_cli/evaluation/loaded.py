"""A model of the report, loaded: what it serves, what the result file says of it, and what it costs on its prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints import load_model
from pmod_cli.evaluation import provenance
from pmod_cli.evaluation.downsample import downsample
from pmod_cli.evaluation.eval_models import EvalModel
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.budgets import PromptBudget, cost_of, cost_of_fewer, prompt_of
from pmod_cli.profiling.count.workload import Workload

if TYPE_CHECKING:
    from pmod_cli.evaluation.outcome import Record


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its processor, and what a score depends on as far as it lies in them."""

    eval_model: EvalModel
    model: Any
    processor: Any
    downsampled: dict[str, Any] | None = None

    def serves(self, other: EvalModel) -> bool:
        """Whether another column is of the same model."""
        mine, its = self.eval_model, other
        return (mine.path, mine.tokens_left, mine.method is None) == (its.path, its.tokens_left, its.method is None)

    def take_method(self, eval_model: EvalModel) -> None:
        """Gives the model the settings of the column's method, if it has one."""
        if eval_model.method is not None:
            self.model.set_method(eval_model.method.to_dict())

    def describe(self, eval_model: EvalModel) -> dict[str, Any]:
        """For the result file."""
        described = {
            **provenance.checkpoint(eval_model.path, eval_model.commit),
            **provenance.loaded(self.model, self.processor),
            "routers": eval_model.routers,
            "selection": eval_model.selection if eval_model.routers != "stock" or eval_model.method else None,
            "downsampled": self.downsampled,
        }
        if eval_model.method is not None:
            share = eval_model.share
            described |= {"method": eval_model.method.method, "control": eval_model.control}
            described["budget"] = share.to_dict() if isinstance(share, PmodSettings) else share
        if self.downsampled is not None:
            described["mean_retention"] = self.downsampled["tokens_left"]
        return described

    def budget(self, eval_model: EvalModel) -> PromptBudget | None:
        """What a column's method may cost on each prompt; None where it runs under no method."""
        if eval_model.method is None or eval_model.share is None:
            return None
        return PromptBudget(Sizes.of(self.model.config), eval_model.method.method, eval_model.share)

    def cost_of_prompts(
        self, eval_model: EvalModel, records: Sequence[Record], whole: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        """For the entry of a benchmark; empty for a stock model, and where the answers do not tell it.

        Args:
            eval_model: A column that this model serves.
            records: Its answered questions.
            whole: Those of a model whose pictures are not downsampled.

        Returns:
            `cost`, the mean of `MethodCost` over the prompts; with a budget `off_budget`, on how many it is not met.
        """
        if not records:
            return {}
        if self.downsampled is not None:
            return self._cost_of_fewer(records, whole)
        budget, config = self.budget(eval_model), self.model.config
        own: PmodSettings | None = getattr(config, "settings", None)
        sizes, totals, base = Sizes.of(config), dict[str, float](), None
        if budget is None and own is not None and not _same_for_any_cut(own):
            if not all(self._has_one_picture(record) for record in records):
                return {}
            base = Workload().rows(sizes)[0].images[0].base
        prompts = Counter(
            (record["vision_tokens"], record["input_tokens"] - record["vision_tokens"]) for record in records
        )
        for (vision, text), times in prompts.items():
            settings = own if budget is None else budget.settings(vision, text)
            if settings is None:
                return {}
            for name, share in cost_of(sizes, settings, prompt_of(vision, text, base)).as_dict().items():
                totals[name] = totals.get(name, 0.0) + share * times
        found: dict[str, Any] = {"cost": {name: total / len(records) for name, total in totals.items()}}
        if budget is not None:
            found["off_budget"] = sum(times for prompt, times in prompts.items() if not budget.is_met(*prompt))
        return found

    def _has_one_picture(self, record: Record) -> bool:
        """Whether a prompt has one picture, or none, and no video: then its numbers of tokens tell how it was cut."""
        marks = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video")]
        images, videos = (record["prompt"].count(mark) if mark else 0 for mark in marks)
        return images < 2 and not videos

    def _cost_of_fewer(self, records: Sequence[Record], whole: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The cost of smaller pictures; empty where a question is not among those with whole ones."""
        asked = {(record["task"], record["doc_id"]): record["vision_tokens"] for record in whole}
        names = [(record["task"], record["doc_id"]) for record in records]
        if not asked.keys() >= set(names):
            return {}
        sizes = Sizes.of(self.model.config)
        costs = [
            cost_of_fewer(
                sizes, record["vision_tokens"], asked[name], record["input_tokens"] - record["vision_tokens"]
            ).as_dict()
            for record, name in zip(records, names, strict=True)
        ]
        return {"cost": {name: sum(cost[name] for cost in costs) / len(costs) for name in costs[0]}}


def _same_for_any_cut(settings: PmodSettings) -> bool:
    """Whether K is the same however many pictures the vision tokens of a prompt are of, and however they are cut."""
    return (settings.target_tokens, settings.quota) == ("vision_all", "row")


def load(eval_model: EvalModel, *, dtype: str, device: str, attention: str) -> Loaded:
    """A model of the report, its pictures downsampled where that is asked."""
    bare = eval_model.method is not None and eval_model.routers == "stock"
    model, processor = load_model(
        eval_model.path,
        dtype=dtype,
        device=device,
        attn_implementation=attention,
        pmod=eval_model.method.to_dict() if bare and eval_model.method is not None else None,
    )
    done = downsample(model, processor, eval_model.tokens_left) if eval_model.tokens_left is not None else None
    return Loaded(eval_model, model, processor, done)

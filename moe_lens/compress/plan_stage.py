"""The plan of `compress`: read what the methods need of the text, and apply or choose one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.corpus import Corpus
from moe_lens.corpus.batches import draw_prompts
from moe_lens.experts.layer_sample import sample_layers
from moe_lens.families import STOCK
from moe_lens.telling import Progress, Say, Stage, StageProgress, begin

from .applied_plan import applicable
from .calibration.calibration import identify, identify_corpus
from .calibration.notes import calibration_notes
from .calibration.statistics_reuse import calibrate_channels_once, calibrate_once
from .calibration.validation_split import split
from .checkpoint.expert_width import down_quantisations, width_for, widths_of
from .checkpoint.model_file import check_no_own_file
from .choice.asked import Asked
from .choice.choice import AUTO, choose
from .choice.layer_budget import TOKENS, PlanAt, budget_layers, possible_counts
from .choice.methods import CHANNELS, possible_shapes
from .choice.readings import read_all
from .choice.trials import TrialBench
from .merging.merging import BY_THRESHOLD, TO_A_NUMBER
from .merging.stage import merge_stage
from .plan.identity import ModelIdentity
from .plan.plan import Plan
from .pruning.channels import FEWEST_TOKENS, plan_channels
from .pruning.pruning import plan_prune
from .repair.router_repair import repair_router
from .repair.router_training import check_trainable
from .resuming.work_folder import WorkFolder
from .stages import (
    CALIBRATING,
    CALIBRATING_CHANNELS,
    MEASURING_LAYERS,
    PLANNING,
    REPAIRING,
    SAMPLING,
)
from .statistics.blending import Blend
from .statistics.statistics import Calibration
from .tensors.parent import open_parent
from .tensors.regroup import describe
from .tensors.size_table import SizeTable
from .tensors.unpacked import fastest

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


@dataclass(frozen=True)
class Reading:
    """How the calibration text is read."""

    sequence_length: int | None
    chat_template: bool
    seed: int
    trust_remote_code: bool = False
    cpu_experts: str = STOCK


class PlanStage:
    """Makes the plan that was asked for.

    Args:
        router: The parent.
        asked: What was asked for, checked.
        text: The calibration text; a third of it compares where something is chosen.
        reading: How it is read.
        work: Where what is measured is kept, and found again; None: nowhere.
        format: Of the weights that will be written, which decides how large they are.
        progress: Called with the stage, and how much of how much is done.
        say: Called with each note.
    """

    def __init__(
        self,
        router: ExpertRouter,
        asked: Asked,
        text: Corpus,
        reading: Reading,
        work: WorkFolder | None = None,
        *,
        format: str = "mlx",
        progress: StageProgress | None,
        say: Say,
    ) -> None:
        self.router, self.asked, self.reading, self.work = router, asked, reading, work
        self.format = format
        self.progress, self.say = progress, say
        self.learn, self.held = text, text
        if asked.validates:
            self.learn, self.held = split(text, reading.seed)
            say(
                f"{len(self.held)} of the {len(text)} calibration prompts make no plan: they "
                "compare (validation)"
            )
        self._fastest: ExpertRouter | None = None
        self._bench: TrialBench | None = None
        self._table: SizeTable | None = None

    def plan(self) -> Plan:
        """The plan, its router repaired if that was asked for.

        Raises:
            UsageError, UnsupportedModelError, NothingToMergeError, MoeLensError: As `compress`.
        """
        asked = self.asked
        if asked.repair_steps is not None:
            check_trainable(self.router)
        if asked.plan is not None:
            plan = applicable(asked.plan, self.router)
        elif asked.chooses:
            plan = self._chosen()
        elif asked.threshold is not None or asked.merge:
            plan = self._merged()
        else:
            plan = self._removed()
        if asked.repair_steps is not None:
            plan = self._repaired(plan, asked.repair_steps)
        return plan

    @property
    def table(self) -> SizeTable:
        """How many bytes smaller models take."""
        if self._table is None:
            assert self.router.path is not None
            trust = self.reading.trust_remote_code
            parent = open_parent(self.router.path, trust_remote_code=trust)
            self._table = SizeTable.of(parent, named_apart=self.format == "hf")
        return self._table

    @property
    def fastest(self) -> ExpertRouter:
        """The parent as it runs fastest."""
        if self._fastest is None:
            self._fastest = fastest(self.router, self.reading.cpu_experts)
        return self._fastest

    def bench(self, parent: ExpertRouter | None = None) -> TrialBench:
        """Where plans are tried, with `parent` as it runs fastest; made once."""
        if self._bench is None:
            tokens = self._tokens(self.held)
            self._bench = TrialBench(
                parent or self.fastest, tokens, self.table, self.work, seed=self.reading.seed
            )
        return self._bench

    def _tokens(self, text: Corpus) -> list[list[int]]:
        reading = self.reading
        return text.tokenize(self.router.tokenizer, reading.sequence_length, reading.chat_template)

    def _chosen(self) -> Plan:
        asked, reading = self.asked, self.reading
        assert asked.size is not None
        readings = read_all(
            self.router,
            self.learn,
            sequence_length=reading.sequence_length,
            chat_template=reading.chat_template,
            statistics_file=_path(asked.statistics_file),
            work=self.work,
            stop_at=asked.stop_at,
            seed=reading.seed,
            cpu_experts=reading.cpu_experts,
            progress=self.progress,
            say=self.say,
        )
        shapes = possible_shapes(readings, asked.experts_per_token)
        limit = asked.size.limit(self.table, readings.statistics.model, shapes)
        bench = self.bench(readings.router)
        found = choose(
            readings,
            bench,
            identify_corpus(self.held, bench.tokens, reading.sequence_length, reading.seed),
            limit,
            experts_per_token=asked.experts_per_token,
            seed=reading.seed,
            progress=self.progress,
        )
        plan = found.plan()
        for note in calibration_notes(readings.statistics, plan):
            self.say(note)
        settings = {**plan.settings, "asked": {"method": AUTO, **asked.settings()}}
        return replace(plan, settings=settings)

    def _merged(self) -> Plan:
        asked, reading = self.asked, self.reading
        if asked.per_layer:
            check_no_own_file(self.router.config)
        statistics = self._statistics(similarity=True)
        model = statistics.model
        count = self._count(model, model.expert_width) if asked.merge else None
        plan = merge_stage(
            self.fastest,
            statistics,
            self._tokens(self.learn),
            asked.merging or (TO_A_NUMBER if asked.merge else BY_THRESHOLD),
            threshold=asked.threshold,
            ratio=asked.ratio,
            experts=count,
            experts_per_token=asked.experts_per_token,
            per_layer=asked.per_layer,
            trust_remote_code=reading.trust_remote_code,
            seed=reading.seed,
            progress=self.progress,
        )
        for note in calibration_notes(statistics, plan):
            self.say(note)
        return plan

    def _removed(self) -> Plan:
        """Fewer experts, narrower ones, or both, by one method."""
        asked = self.asked
        width, plan = self._width(), None
        if asked.size is not None and asked.method != CHANNELS:
            plan = self._pruned(width)
        if width is None:
            assert plan is not None
            return plan
        reading = self.reading
        channels = calibrate_channels_once(
            self.fastest,
            self.learn,
            self.work,
            sequence_length=reading.sequence_length,
            chat_template=reading.chat_template,
            seed=reading.seed,
            progress=self._begin(CALIBRATING_CHANNELS),
        )
        plan = plan_channels(channels, width, plan, experts_per_token=asked.experts_per_token)
        again = describe(down_quantisations(self.router.layers), width)
        for note in [*([again] if again else []), *_guessed_channels(plan)]:
            self.say(note)
        return plan

    def _pruned(self, width: int | None) -> Plan:
        asked, reading = self.asked, self.reading
        method = asked.decided_method
        statistics = self._statistics(similarity=False)
        count = self._count(statistics.model, width or statistics.model.expert_width)
        samples = None
        if method == "greedy":
            samples = sample_layers(
                self.fastest,
                self._tokens(self.learn),
                reading.seed,
                self._begin(SAMPLING),
            )

        def plan_at(
            ratio: float | None, experts: int | None, progress: Progress | None = None
        ) -> Plan:
            return plan_prune(
                statistics,
                ratio,
                method,
                experts=experts,
                experts_per_token=asked.experts_per_token,
                blend=None if asked.blend is None else Blend.parse(asked.blend),
                protect=asked.protect,
                seed=reading.seed,
                router=self.fastest,
                samples=samples,
                progress=progress,
            )

        plan = plan_at(asked.ratio, count, self._begin(PLANNING))
        if asked.per_layer:
            plan = self._per_layer(statistics, plan, lambda experts: plan_at(None, experts))
        for note in calibration_notes(statistics, plan):
            self.say(note)
        return plan

    def _per_layer(self, statistics: Calibration, equal: Plan, plan_at: PlanAt) -> Plan:
        """The plan with numbers of experts of each layer's own, where that loses less."""
        check_no_own_file(self.router.config)
        asked, bench = self.asked, self.bench()
        found = budget_layers(
            plan_at,
            equal,
            possible_counts(statistics, asked.experts_per_token, protect=asked.protect),
            dict(self.table.by_layer),
            TrialBench(
                bench.router,
                draw_prompts(self._tokens(self.learn), TOKENS, self.reading.seed),
                self.table,
                self.work,
                seed=self.reading.seed,
            ),
            bench,
            self._begin(MEASURING_LAYERS),
        )
        self.say(found.text)
        return found.plan

    def _statistics(self, *, similarity: bool) -> Calibration:
        reading = self.reading
        return calibrate_once(
            self.fastest,
            self.learn,
            _path(self.asked.statistics_file),
            self.work,
            sequence_length=reading.sequence_length,
            similarity=similarity,
            chat_template=reading.chat_template,
            stop_at=self.asked.stop_at,
            seed=reading.seed,
            progress=self._begin(CALIBRATING),
            say=self.say,
        )

    def _count(self, model: ModelIdentity, width: int) -> int | None:
        """The experts to keep; None where a ratio says it."""
        asked = self.asked
        if asked.target_gb is None:
            return asked.experts
        assert asked.size is not None
        k = asked.experts_per_token or (1 if asked.merge else model.experts_per_token)
        return asked.size.most_experts(self.table, model, width, k)

    def _width(self) -> int | None:
        """The channels to keep in each expert; None: all."""
        asked, router = self.asked, self.router
        if asked.method == CHANNELS:
            assert asked.size is not None
            possible = widths_of(router.config, router.layers).possible
            return asked.size.widest(self.table, identify(router), possible)
        if asked.expert_width is None:
            return None
        return width_for(router.config, router.layers, asked.expert_width)

    def _repaired(self, plan: Plan, steps: int) -> Plan:
        found = repair_router(
            self.bench(),
            plan,
            self._tokens(self.learn),
            steps=steps,
            seed=self.reading.seed,
            progress=self._begin(REPAIRING),
        )
        self.say(str(found.evidence["router_repair"]["text"]))
        return found

    def _begin(self, stage: Stage) -> Progress | None:
        return begin(self.progress, stage)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


def _guessed_channels(plan: Plan) -> list[str]:
    few = plan.evidence["channels_by_weights_only"]
    if not few:
        return []
    listed = ", ".join(f"layer {layer}: {ids}" for layer, ids in few.items())
    return [
        f"some experts had fewer than {FEWEST_TOKENS} calibration tokens, so their channels were "
        f"chosen by their weights alone ({listed}); more or more varied calibration text would tell"
    ]

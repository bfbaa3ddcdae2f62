"""The sections of a recipe: every key with its type, bounds, default and meaning.

Defaults are the paper's GPT-2 run (arXiv 2506.05695) wherever it says something.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pocl.recipe.comparing import CompareSection, Section
from pocl.recipe.models import Dtype, StudentSection, TeacherSection
from pocl.recipe.training import Fraction, TrainingSection, as_tuple

DivergenceName = Literal[
    "fkl", "rkl", "skew_fkl", "skew_rkl", "jsd", "tvd", "jeffreys", "alpha", "alpha_beta", "mixed_kl"
]


# One number for all stages, two for the first and the last with even steps between, or one for each stage.
PositiveSchedule = Annotated[tuple[PositiveFloat, ...], BeforeValidator(as_tuple), Field(min_length=1)]
SkewSchedule = Annotated[
    tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
]
FractionSchedule = Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class DataSection(Section):
    """Prompts and reference responses. A plain string stands for `source`."""

    source: str = "embedded"
    """Hub id, .jsonl/.json/.csv/.txt (also .gz, .zst)/.parquet/.arrow file, folder, `embedded` for the pairs of
    chatterbot-corpus, `embedded-text` for these and paragraphs of Wikipedia, or `embedded-corpus` for texts, Python's
    own reference."""
    split: str = "train"
    """Split of a hub data set to train on."""
    validation: str | None = None
    """Another file, folder or hub id for validation; without it `num_validation` prompts are held out of `source`."""
    validation_split: str = "validation"
    """Split of `validation` to read, where it has several."""
    test: str | None = None
    """Another file, folder or hub id for the final evaluation; without it `num_test` prompts are held out."""
    test_split: str = "test"
    """Split of `test` to read, where it has several."""
    num_train: PositiveInt | None = None
    """Train on this many samples at most."""
    num_validation: NonNegativeInt = 128
    """Samples for validation at most. 0: no validation."""
    num_test: NonNegativeInt = 256
    """Samples for the final evaluation at most. 0: no evaluation."""
    template: Literal["auto", "chat", "alpaca", "plain"] = "auto"
    """How prompt and response become text. auto: the tokenizer's chat template if it has one, else the Alpaca text."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of prompt and response together; a longer prompt is cut from the left, the response is kept."""
    max_prompt_length: PositiveInt = 256
    """Tokens of the prompt at most."""
    labels: Literal["last", "all"] = "last"
    """What is learnt of a conversation: its last answer, or all of them. Ranking and evaluation judge the last one."""
    template_kwargs: dict[str, Any] = {}  # noqa: RUF012
    """Further variables of the chat template, such as `{enable_thinking: false}`. A row's own come first."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What the text of a special token (`<|im_end|>`) is in the data: text like any other, or the token."""
    blocks: Literal["joined", "apart"] = "joined"
    """How the texts of a corpus (a `text` column) become blocks of `max_length` tokens: joined, with the end token
    between them, or each text apart. Its samples are then blocks; `num_train` and the like count texts."""
    workers: PositiveInt | None = None
    """Processes that turn text into tokens. Empty: one for each core. The rows are the same for any number."""
    trust_remote_code: bool = False
    """Run loading code that comes with the data. Only for authors you trust."""

    @model_validator(mode="after")
    def _prompt_fits(self) -> DataSection:
        if self.template_kwargs:
            from pocl.data.templates import check_template_kwargs

            check_template_kwargs(self.template_kwargs)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length must be below max_length = {self.max_length}, got {self.max_prompt_length}"
            )
        return self


class WarmupSection(Section):
    """Plain distillation on all samples before anything is ranked, for a student that was never trained."""

    epochs: NonNegativeInt = 0
    """Passes over the training samples. 0: no warm-up, the student is ranked as it is."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate, cosine to 0."""
    temperature: PositiveFloat = 1.0
    """Softens both models' distributions."""
    kd_ratio: Fraction = 1.0
    """Weight of the distillation loss against label cross-entropy."""


WordRule = Literal["auto", "rouge_score", "unicode", "characters"]
Measure = Literal["rouge_l", "cross_entropy", "response_length", "teacher_cross_entropy", "kl_to_teacher"]


class CriterionSection(Section):
    """One measure of difficulty. A plain string stands for `measure`."""

    measure: Measure
    direction: Literal["ascending", "descending"] | None = None
    """`ascending`: small values are easy. Empty: large values of rouge_l are easy, small ones of all others."""
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    def __repr__(self) -> str:
        options: list[str] = [self.direction] if self.direction else []
        options += [f"weight {self.weight:g}"] if self.weight != 1 else []
        return f"{self.measure} ({', '.join(options)})" if options else self.measure


def _as_criteria(value: Any) -> Any:
    given = (value,) if isinstance(value, Mapping) else as_tuple(value)
    return (
        tuple({"measure": v} if isinstance(v, str) else v for v in given) if isinstance(given, (list, tuple)) else value
    )


class RankingSection(Section):
    """How hard each sample is for the student: its answer's ROUGE-L and its cross-entropy, fused by reciprocal rank."""

    criteria: Annotated[tuple[CriterionSection, ...], BeforeValidator(_as_criteria), Field(min_length=1)] = (
        CriterionSection(measure="rouge_l"),
        CriterionSection(measure="cross_entropy"),
    )
    """What makes a sample hard: any of rouge_l, cross_entropy, response_length, teacher_cross_entropy, kl_to_teacher,
    or `{measure: ..., direction: ascending | descending, weight: 1.0}`. Without rouge_l nothing is generated, the most
    of the work. The paper: the first two."""
    k: PositiveFloat = 60.0
    """Constant of reciprocal rank fusion, 1 / (k + rank)."""
    max_new_tokens: PositiveInt = 256
    """Longest answer the student may write."""
    no_repeat_ngram_size: NonNegativeInt = 6
    """No phrase of this many tokens twice in prompt and answer. 0: no such rule."""
    words: WordRule = "auto"
    """What ROUGE-L takes for a word, here and where `training.metric` is rouge_l. rouge_score: runs of a-z and 0-9, as
    that package. unicode: words of any script, single characters where it is written without spaces. characters: each
    of them. auto: rouge_score for a reference that has a word under it, else unicode."""
    partition: Literal["count", "quantile"] = "count"
    """Parts of equal size (the paper), or cut at quantiles of the score so that equal scores stay together."""
    refresh: Literal["never", "stage"] = "never"
    """stage: measure difficulty again before every stage, with the student as it is then. The paper: never."""

    @property
    def needs_answers(self) -> bool:
        """Whether the student has to answer the questions."""
        return any(criterion.measure == "rouge_l" for criterion in self.criteria)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to run over the samples."""
        return any("teacher" in criterion.measure for criterion in self.criteria)

    @model_validator(mode="after")
    def _each_measure_once(self) -> RankingSection:
        names = [criterion.measure for criterion in self.criteria]
        if len(set(names)) < len(names):
            raise ValueError(f"criteria name a measure twice: {', '.join(names)}; give each once, with a weight")
        return self


class CurriculumSection(Section):
    """The stages: which samples, how hot, how much of the teacher. A pair of numbers is for the first and the last."""

    kind: Literal["baby_step", "constant", "one_pass", "reversed", "shuffled", "whole"] = "baby_step"
    """baby_step: easy samples first, harder ones added (the paper). The others are controls: constant is plain KD on
    all samples in a single stage; one_pass drops the easy ones; reversed starts with the hardest; shuffled deals
    samples to stages at random; whole has all samples in every stage. All make as many optimizer steps as baby_step."""
    num_stages: PositiveInt = 4
    """Stages, and equal parts that the ranked samples are cut into."""
    epochs: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (8,)
    """Passes over its samples in each stage; one number, or one for each stage."""
    max_steps: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    """Optimizer steps of each stage, in place of `epochs`; one number, or one for each stage."""
    temperature: PositiveSchedule = (1.0, 2.0)
    """Of both softmaxes; one number, a pair, or one for each stage. The default is the paper's; rising together with
    kd_ratio it harmed in our own experiment (docs/evidence.md)."""
    kd_ratio: FractionSchedule = (0.7, 1.0)
    """Weight of the distillation loss against label cross-entropy; one number, a pair, or one for each stage."""
    skew: SkewSchedule = (0.1,)
    """Mixture weight of the skewed divergences; one number, a pair, or one for each stage."""
    learning_rate: PositiveSchedule = (1e-4,)
    """Peak, reached at each stage's start; one number, a pair, or one for each stage."""
    spacing: Literal["linear", "geometric"] = "linear"
    """How a pair becomes one number a stage: in equal steps or in equal factors."""
    patience: PositiveInt | None = None
    """End a stage after this many evaluations (one an epoch) without improvement. Empty: all epochs."""
    start: Literal["best", "last"] = "best"
    """A stage starts from the best weights of the one before, by `training.metric`, or from its last."""
    optimizer: Literal["fresh", "carried"] = "fresh"
    """Whether a stage starts with a new optimizer."""
    schedule: Literal["restart", "continuous"] = "restart"
    """Whether every stage has a cosine of the learning rate for itself, or all share one."""
    control: bool = False
    """Also train a second student, `control/student`, by plain distillation from the same start for as many optimizer
    steps, and judge it beside the other: what the stages added. It takes as long again as the stages."""

    @model_validator(mode="after")
    def _schedules_fit(self) -> CurriculumSection:
        pairs = ("temperature", "kd_ratio", "skew", "learning_rate")
        for name in (*pairs, "epochs", "max_steps"):
            if getattr(self, name) is None:
                continue
            count = len(getattr(self, name))
            allowed = {1, self.num_stages} | ({2} if name in pairs else set())
            if count not in allowed:
                raise ValueError(
                    f"{name} must have {' or '.join(map(str, sorted(allowed)))} numbers with {self.num_stages} stages, "
                    f"got {count}"
                )
            if self.kind == "constant" and count > 1:
                raise ValueError(f"kind = 'constant' has a single stage: give {name} as one number, got {count}")
            if self.spacing == "geometric" and name in pairs and count == 2 and 0 in getattr(self, name):
                raise ValueError(f"spacing = 'geometric' needs {name} above 0 at both ends, got {getattr(self, name)}")
        if self.kind == "constant" and self.control:
            raise ValueError(
                "control: kind = 'constant' is plain distillation itself; leave control out, or set a kind"
            )
        return self


class LossSection(Section):
    """What is minimised at every response token."""

    divergence: DivergenceName = "fkl"
    """Distance between the teacher's and the student's distribution."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of `jsd` (1 is towards forward KL). The paper's authors have 0.1, in their words 0.9 on the student."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Order of `alpha`."""
    scale_by_temperature: bool | Literal["authors"] = True
    """Multiply the divergence by the squared temperature, so that its gradient keeps its size. authors: as the code of
    the paper's authors, which does so for `fkl`, `jsd` and `skew_rkl` alone."""


class OnPolicySection(Section):
    """Training on the student's own answers in place of the reference ones, as GKD and DistiLLM do."""

    share: Fraction = 0.0
    """Share of the batches whose responses are sampled from the student. Above 0 the teacher runs for those batches."""
    max_new_tokens: PositiveInt = 128
    """Longest sampled response."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    replay: NonNegativeInt = 0
    """Sampled rows that each process keeps to use again within a stage."""


class TeacherCacheSection(Section):
    """Whether the teacher runs once (its hidden states kept on disk) or at every step."""

    mode: Literal["auto", "cached", "online"] = "auto"
    """auto: cached where samples are seen more than once, all from the data, and the disk has room."""
    dtype: Dtype | None = None
    """Number format on disk. Empty: the teacher's, which loses nothing."""
    batch_tokens: PositiveInt = 4096
    """Tokens sent through the teacher at once, padding included."""


class EvaluationSection(Section):
    """How the models are compared in the end, on samples never trained on."""

    max_new_tokens: PositiveInt = 256
    """Longest answer a model may write."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the answers. 0: greedy. The paper samples at 1."""
    seeds: Annotated[tuple[int, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (10,)
    """Answers are drawn once with each seed and the scores averaged; greedy answers need one."""
    words: WordRule = "auto"
    """What ROUGE-L takes for a word; see `ranking.words`."""
    include_teacher: bool = True
    """Also evaluate the teacher, the mark to reach."""


class HubSection(Section):
    """Uploading the finished student. A plain string stands for `repository`."""

    repository: str | None = None
    """Upload `student/`, weights, tokenizer and model card, to this repository of the Hugging Face hub when all else is
    done, as in `me/my-student`. The token is that of HF_TOKEN or `hf auth login`, never of a recipe."""
    private: bool = True
    """Where the repository is made by this upload: seen by you alone."""


SHORTHAND = {"teacher": "model", "student": "model", "data": "source", "hub": "repository"}


class Recipe(Section):
    """A whole run. See the sections for their keys."""

    name: str = "distillation"
    """What the report is titled."""
    output: Annotated[str, AfterValidator(os.path.expanduser)] = "runs/distillation"
    """Folder of the run; everything is written below it."""
    seed: NonNegativeInt = 10
    """Makes the run repeatable: data split, order, sampling."""
    teacher: TeacherSection = TeacherSection()
    student: StudentSection
    data: DataSection = DataSection()
    warmup: WarmupSection = WarmupSection()
    ranking: RankingSection = RankingSection()
    curriculum: CurriculumSection = CurriculumSection()
    loss: LossSection = LossSection()
    on_policy: OnPolicySection = OnPolicySection()
    training: TrainingSection = TrainingSection()
    teacher_cache: TeacherCacheSection = TeacherCacheSection()
    evaluation: EvaluationSection = EvaluationSection()
    hub: HubSection = HubSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            short = {key: {leaf: values[key]} for key, leaf in SHORTHAND.items() if isinstance(values.get(key), str)}
            return {**values, **short}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.data.num_train is not None and self.data.num_train < self.curriculum.num_stages:
            raise ValueError(
                f"data.num_train = {self.data.num_train} samples cannot fill curriculum.num_stages = "
                f"{self.curriculum.num_stages} stages; raise the first or lower the second"
            )
        if self.data.num_validation == 0 and (self.curriculum.start == "best" or self.curriculum.patience):
            raise ValueError(
                "curriculum.start = 'best' and curriculum.patience need validation samples: set data.num_validation "
                "above 0, or curriculum.start to last and patience to null"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_where_it_is_needed(self) -> Recipe:
        served = self.teacher.server is not None
        where = f"teacher.server = {self.teacher.server}" if served else "teacher.engine = vllm"
        if served and self.student.from_teacher:
            raise ValueError(
                f"{where}: no student can be cut from a teacher that is not here; name one as student.model"
            )
        if not served and (self.teacher.engine == "transformers" or self.student.from_teacher):
            return self
        if self.teacher_cache.mode == "online":
            raise ValueError(f"{where}: the teacher is asked once and stored; leave teacher_cache.mode at auto")
        if self.ranking.needs_teacher:
            raise ValueError(
                f"{where}: the teacher is not here to rank by its cross-entropy or KL; choose other ranking.criteria"
            )
        if self.teacher.engine == "vllm" and (self.on_policy.share or self.teacher.adapt_epochs):
            wants = "on_policy.share" if self.on_policy.share else "teacher.adapt_epochs"
            raise ValueError(
                f"{where}: {wants} needs the teacher here in training; set it to 0, or teacher.engine to transformers"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

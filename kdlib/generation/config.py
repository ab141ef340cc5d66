"""What `kd generate` is asked for: a teacher, its sampling, prompts, limits, a budget and prices."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from kdlib.config.sections import Count, Number, Positive, Section, Seed, refuse
from kdlib.errors import PLAIN_NAMES, SECRET_NAMES
from kdlib.filters.config import Filters
from kdlib.prompts.config import Prompts

KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
Dollars = Annotated[Number, Field(ge=0)]
Above = Annotated[Number, Field(gt=0)]


def _variable(name: str) -> str:
    is_name = re.fullmatch(r"[A-Za-z_]\w*", name)
    if is_name and SECRET_NAMES.search(name) and not PLAIN_NAMES.search(name):
        return name
    form = "the name of an environment variable that holds the key, as MY_API_KEY (…_KEY, …_TOKEN)"
    raise ValueError(f"it is {form}: by such a name its value is known and kept out of every file")


def _address(url: str) -> str:
    if re.match(r"https?://[^\s/?#]+", url) and not re.search(r"[\s?#]", url):
        return url.rstrip("/")
    raise ValueError(f"found {url!r}; an address is like http://localhost:8000/v1")


class Endpoint(Section):
    """A teacher that is asked over the network, in OpenAI's or Anthropic's wire form."""

    provider: Literal["openai", "anthropic"] = "openai"  # or what speaks like it: vLLM, transformers serve
    model: str
    base_url: Annotated[str, AfterValidator(_address)] | None = None  # the provider's own where None
    key_variable: Annotated[str, AfterValidator(_variable)] | None = None

    @property
    def key_name(self) -> str | None:
        """The variable that holds the key: the provider's own; of another address only one that is named."""
        return self.key_variable or (None if self.base_url else KEY_VARIABLES[self.provider])


class Local(Section):
    """A teacher that is loaded into this process."""

    model: str  # a hub id, a folder, a .gguf file or a built-in name
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Positive = 8


class Asked(Section):
    """Who is asked: one of the two."""

    endpoint: Endpoint | None = None
    local: Local | None = None

    @model_validator(mode="after")
    def _one(self):
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            found = " and ".join(given) or "neither"
            raise ValueError(f"found {found} of endpoint and local; a teacher is exactly one of them")
        return self

    @property
    def model(self) -> str:
        return (self.endpoint or self.local).model

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its answers from another's: wherever it is asked."""
        where = self.endpoint.provider if self.endpoint else "local"
        return {"teacher": where, "model": self.model}


class Sampling(Section):
    """How an answer is drawn; what is null is left to the teacher."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Positive = 1024  # of an answer
    stop: list[str] = []
    extra: dict[str, Any] = {}  # sent as it is: {top_k: 40}, {reasoning_effort: low}


class Limits(Section):
    """How hard the endpoint is asked; a local teacher knows none of it."""

    requests_per_minute: Positive | None = None  # retries count
    tokens_per_minute: Positive | None = None  # of prompts, and the most that answers can have
    at_once: Positive = 8
    timeout: Above = 120.0  # s without a sign
    retries: Annotated[Count, Field(ge=0)] = 5  # of a failed request, by the SDK, which heeds retry-after


def _dollars(usd: float) -> float:
    if usd <= 0:
        raise ValueError(f"found {usd:g}: nothing can be asked for it; give dollars, or budget: null")
    return usd


class BudgetConfig(Section):
    """What may be spent, everything counted; never passed."""

    usd: Annotated[Number, AfterValidator(_dollars)]


class Prices(Section):
    """Your own prices: of tokens, or of a machine by the hour."""

    input: Dollars | None = None  # per million tokens
    cached: Dollars | None = None  # of those, what the endpoint had cached; as `input` where None
    output: Dollars | None = None
    batch: Annotated[Number, Field(gt=0, le=1)] = 0.5  # the share of it that a Batch API takes
    hour: Dollars | None = None  # of a local teacher

    @model_validator(mode="after")
    def _one_way(self):
        tokens = (self.input, self.output)
        if (self.hour is None) == (tokens == (None, None)) or (None in tokens and tokens != (None, None)):
            raise ValueError("give input and output (dollars per million tokens), or hour, and not both")
        return self


class Judge(Section):
    """A second model, which gives each answer that the filters keep a score from 1 to 10."""

    teacher: Asked
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=512)
    prices: Prices | None = None


@dataclass(frozen=True)
class Stage:
    """Who is asked, and how: the teacher, or the judge."""

    name: str
    teacher: Asked
    sampling: Sampling
    prices: Prices | None
    limits: Limits
    seed: int
    batch: bool
    has_budget: bool

    @property
    def drawn(self) -> dict[str, Any]:
        """What an answer depends on beside its prompt and who gives it, as far as it is said."""
        said = {name: value for name, value in self.sampling.as_dict().items() if value not in (None, [], {})}
        return said | ({"seed": self.seed} if self.teacher.local else {})

    def faults(self) -> list[str]:
        """What does not go together, a line each."""
        local, prices, faults = self.teacher.local, self.prices, []
        if local and self.batch:
            faults.append("batch: a local teacher has no Batch API; leave it out")
        if prices and (prices.hour is None) == (local is not None):
            way = "by the hour; give hour" if local else "by the token; give input and output"
            faults.append(f"prices: {'a local model' if local else 'an endpoint'} is paid {way}")
        most, per_minute = self.sampling.max_tokens, self.limits.tokens_per_minute
        if per_minute is not None and per_minute <= most:
            needed = f"more than sampling.max_tokens, {most}, or no request would ever fit"
            faults.append(f"limits.tokens_per_minute: found {per_minute}; it needs {needed}")
        return faults


class GenerationConfig(Section):
    """One complete set of rows to be made."""

    seed: Seed = 0
    teacher: Asked
    sampling: Sampling = Sampling()
    prompts: Prompts
    limits: Limits = Limits()
    budget: BudgetConfig | None = None
    prices: Prices | None = None  # they win over the table's
    batch: bool = False  # by the Batch API, within a day, at half the price
    filters: Filters = Filters()
    judge: Judge | None = None  # filters.lowest_score says which score is enough

    @model_validator(mode="after")
    def _fits(self):
        judged = [f"judge.{fault}" for fault in self.judging.faults()] if self.judging else []
        refuse([*self.stage.faults(), *judged])
        return self

    @property
    def stage(self) -> Stage:
        """The teacher's."""
        return self._stage("answers", self.teacher, self.sampling, self.prices)

    @property
    def evolving(self) -> Stage:
        """The teacher's too: harder variants of the prompts."""
        return replace(self.stage, name="harder prompts")

    @property
    def judging(self) -> Stage | None:
        """The judge's, where there is one."""
        judge = self.judge
        return judge and self._stage("judge", judge.teacher, judge.sampling, judge.prices)

    def _stage(self, name: str, teacher: Asked, sampling: Sampling, prices: Prices | None) -> Stage:
        has_budget = self.budget is not None
        return Stage(name, teacher, sampling, prices, self.limits, self.seed, self.batch, has_budget)

    def asking(self) -> dict[str, Any]:
        """What the answers depend on: a run goes on only where this is the same."""
        found = self.as_dict()
        return {"seed": self.seed, "teacher": self.teacher.identity} | {
            name: found[name] for name in ("sampling", "prompts")
        }

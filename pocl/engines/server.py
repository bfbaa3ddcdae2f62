"""A model behind an OpenAI-compatible server that tells log-probabilities of prompts: vLLM's does."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from pocl.engines.http import Client, ServerError
from pocl.engines.protocol import Advance, Row, check_rows, predicting
from pocl.engines.top_k import check_k
from pocl.engines.vllm import seed_of
from pocl.run_folder import write_text
from pocl_kernels import Head

_T = TypeVar("_T")
_COMPLETIONS = "/v1/completions"
# Two answers of one model may differ by rounding, in bfloat16 and in other batches; another model differs by nats.
SAME = 0.25
_SUM, _ABOVE_ZERO = 1.01, 1e-3
_PADDING = -1
_PROBE_TOKENS = 32

Told = list[dict[int, tuple[float, int | None, str | None]]]
"""For each position from the second on: by token id its log-probability, rank and text."""


class ServerEngine:
    """Asks a server about rows and prompts, many at a time. See `Engine`; it gives no hidden states.

    Before its first answers are used it is looked at: that it has the model, that its token ids are the student's, how
    many log-probabilities it gives, and that they are those of the next token at temperature 1.

    Args:
        url: `http://host:port`.
        model: its name there.
        tokenizer: the student's.
        api_key_env: name of the environment variable that holds the key.
        in_flight: questions at a time.
        timeout, retries, backoff: see `pocl.engines.http.Client`.

    Raises:
        ValueError: see `Client`.
    """

    name = "server"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: Any,
        api_key_env: str | None = None,
        in_flight: int = 16,
        timeout: float = 600.0,
        retries: int = 12,
        backoff: float = 0.5,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {in_flight}")
        self.client = Client(
            url, api_key_env=api_key_env, connections=in_flight, timeout=timeout, retries=retries, backoff=backoff
        )
        self.model, self.tokenizer, self.in_flight = model, tokenizer, in_flight
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.context: int | None = None
        self._known = False
        self._looked_at: set[int] = set()  # k for which it was looked at

    def fingerprint(self) -> str:
        """The name of the model; whether it is the one of before is seen by what it says (`recognise`)."""
        self._find_model()
        return hashlib.blake2b(self.model.encode(), digest_size=16).hexdigest()

    def head(self) -> Head:
        self._no_states()

    def hidden_states(self, rows: Sequence[Row], advance: Advance | None = None) -> Tensor:
        self._no_states()

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        *,
        eos_token_ids: Sequence[int],
        sample_ids: Sequence[int],
        advance: Advance | None = None,
    ) -> list[list[int]]:
        """See `Engine.answers`.

        Raises:
            ValueError: `no_repeat_ngram_size` is set, which servers do not know, or no token ids come back.
        """
        if settings.no_repeat_ngram_size:
            raise ValueError("no_repeat_ngram_size is a rule that servers do not know; set it to 0")
        self._find_model()
        sampling: dict[str, Any] = {"temperature": 0.0}
        if settings.do_sample:
            top_k = settings.top_k or -1
            sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": top_k}
        ends = {int(i) for i in eos_token_ids}

        def ask(i: int) -> list[int]:
            choice = self._choice(
                list(prompts[i]),
                max_tokens=settings.max_new_tokens,
                seed=seed_of(settings.seed, sample_ids[i]) >> 1,
                stop_token_ids=sorted(ends),
                return_token_ids=True,
                **sampling,
            )
            ids = choice.get("token_ids")
            if not isinstance(ids, list):
                raise ServerError(
                    f"the server at {self.client.url} gives no token ids of its answers (return_token_ids)"
                )
            stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            return ids[:stop]

        return list(self._all(ask, range(len(prompts)), lambda _: 1, advance))

    def log_probs_of(self, rows: Sequence[Row], advance: Advance | None = None) -> list[Tensor]:
        self._look(rows, 1)

        def ask(row: Row) -> Tensor:
            told, ids = self._told(row, 1), row["input_ids"]
            return torch.tensor([told[i][ids[i + 1]][0] for i in predicting(row).tolist()])

        return list(self._all(ask, rows, len, advance))

    def top_k(self, rows: Sequence[Row], k: int, advance: Advance | None = None) -> tuple[Tensor, Tensor]:
        check_k(k, self.vocabulary)
        self._look(rows, k)
        parts = list(self._all(lambda row: self._likeliest(row, k), rows, lambda part: len(part[0]), advance))
        return torch.cat([ids for ids, _ in parts]), torch.cat([log_probs for _, log_probs in parts])

    def recognise(self, folder: Path, row: Row) -> None:
        """Note what the model says of a row, or compare it with what was noted.

        Raises:
            ValueError: it is another model than the one that began.
        """
        file = folder / "probe.json"
        self._look([row], 1)
        told, ids = self._told(row, 1), row["input_ids"]
        now = [told[i][ids[i + 1]][0] for i in range(min(len(ids) - 1, _PROBE_TOKENS))]
        if not file.is_file():
            write_text(file, json.dumps({"log_probs": now}))  # whole or not at all
            return
        before = json.loads(file.read_text("utf-8"))["log_probs"]
        change = sum(abs(a - b) for a, b in zip(before, now, strict=True)) / max(len(now), 1)
        if not change <= SAME:
            raise ValueError(
                f"the server at {self.client.url} has another model under the name {self.model!r} than when {folder} "
                f"was begun: its log-probabilities of sample {row.get('sample_id')} have changed by {change:.2g} nats; "
                "serve the model of before, or choose another folder"
            )

    def close(self) -> None:
        self.client.close()

    # ------------------------------------------------------------------------------------------------------- looking

    def _find_model(self) -> None:
        if self._known:
            return
        listed = self.client.ask("/v1/models").get("data")
        found = {each["id"]: each for each in listed or [] if isinstance(each, dict) and "id" in each}
        if self.model not in found:
            raise ValueError(
                f"the server at {self.client.url} has no model {self.model!r}; it has "
                f"{', '.join(map(repr, found)) or 'none'}"
            )
        limit = found[self.model].get("max_model_len")
        self.context = limit - 1 if isinstance(limit, int) else None  # it writes one token
        self._known = True

    def _look(self, rows: Sequence[Row], k: int) -> None:
        """Checks rows; and, before the first k log-probabilities are used, what they are."""
        self._find_model()
        check_rows(self, rows)
        if k in self._looked_at:
            return
        row = min(
            (row for row in rows if len(row["input_ids"]) > 2), key=lambda row: len(row["input_ids"]), default=None
        )
        if row is None:
            return  # nothing to compare
        told = self._told(row, k)
        self._check_tokens(told)
        self._check_next(row, told, k)
        self._looked_at.add(k)

    def _check_tokens(self, told: Told) -> None:
        """Raise a ValueError where the texts of ids are not those of the student's tokenizer."""
        texts = {token: text for position in told for token, (_, _, text) in position.items() if text}
        mine = {token: self.tokenizer.decode([token]) for token in texts if token < self.vocabulary}
        # a token may be a part of a character
        known = {token: text for token, text in mine.items() if "\ufffd" not in text + texts[token]}
        differing = [token for token, text in known.items() if _plain(text) != _plain(texts[token])]
        if len(differing) > 0.05 * len(known) or len(mine) < 0.95 * len(texts):
            token = (differing or [max(texts)])[0]
            raise ValueError(
                f"the model of the server at {self.client.url} has another tokenizer than the student: token {token} "
                f"is {texts[token]!r} there and {mine.get(token)!r} here; serve a teacher that shares the student's"
            )

    def _check_next(self, row: Row, told: Told, k: int) -> None:
        """Raise a ValueError unless what is told of a prompt's token is what the model says when it writes there."""
        ids = list(row["input_ids"])
        place = len(ids) // 2
        choice = self._choice(ids[:place], max_tokens=1, temperature=1.0, logprobs=min(k, 5))
        written = (choice.get("logprobs") or {}).get("top_logprobs") or [None]
        if not written[0]:
            raise ValueError(
                f"the server at {self.client.url} gives no log-probabilities of what it writes (logprobs), so nobody "
                "can tell what those of prompts are; use a server that does, such as vLLM's"
            )
        expected = sorted(written[0].values(), reverse=True)[: min(k, 5)]

        def apart(at: int) -> float:
            if not 0 <= at < len(told):
                return math.inf
            found = sorted((value for value, _, _ in told[at].values()), reverse=True)
            return max(abs(a - b) for a, b in zip(expected, found, strict=False))

        if apart(place - 1) <= SAME:
            return
        if min(apart(place - 2), apart(place)) <= SAME:
            raise ValueError(
                f"the server at {self.client.url} gives log-probabilities of prompts that are shifted by one token; "
                "use a release in which those of a position are of the token there, given those before it"
            )
        raise ValueError(
            f"the log-probabilities of prompts that the server at {self.client.url} gives are not those of the next "
            f"token at temperature 1: they are {apart(place - 1):.2g} nats from what it gives when it writes there; "
            "serve the model without a temperature or other changes of its logits"
        )

    # -------------------------------------------------------------------------------------------------------- asking

    def _all(
        self, ask: Callable[[Any], _T], each: Iterable[Any], count: Callable[[_T], int], advance: Advance | None
    ) -> Iterator[_T]:
        """The answers, in order, of at most `in_flight` questions at a time."""
        pool = ThreadPoolExecutor(self.in_flight, thread_name_prefix="pocl-server")
        try:
            futures: list[Future[_T]] = [pool.submit(ask, one) for one in each]
            for future in futures:
                found = future.result()
                if advance is not None:
                    advance(count(found))
                yield found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _choice(self, prompt: list[int], **details: Any) -> dict[str, Any]:
        reply = self.client.ask(_COMPLETIONS, {"model": self.model, "prompt": prompt, **details})
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ServerError(f"the server at {self.client.url} answers {_COMPLETIONS} without choices")
        return choices[0]

    def _told(self, row: Row, k: int) -> Told:
        """What the server says of every token of a row but the first.

        Raises:
            ValueError: it says too little, of other tokens, or what is no log-probability; names the sample.
        """
        ids, sample = list(row["input_ids"]), row.get("sample_id")
        try:
            choice = self._choice(ids, max_tokens=1, temperature=1.0, prompt_logprobs=k)
        except ServerError as error:
            if "logprobs" in str(error) and "HTTP 400" in str(error):
                raise ValueError(
                    f"{error}; start the server with --max-logprobs {k} (vLLM's allows 20), or lower top_k"
                ) from None
            raise
        positions = choice.get("prompt_logprobs")
        if not isinstance(positions, list) or len(positions) != len(ids):
            got = len(positions) if isinstance(positions, list) else "none"
            raise ValueError(
                f"the server at {self.client.url} gives log-probabilities of {got} tokens of sample {sample}, which "
                f"has {len(ids)}; it must take token ids and know prompt_logprobs, as vLLM's does"
            )
        told = [_entries(position) for position in positions[1:]]
        strange = [place for place, found in enumerate(told) if ids[place + 1] not in found]
        if strange:
            where = strange[0]
            behind = where + 2 < len(ids) and ids[where + 2] in told[where]
            why = "they are shifted by one token" if behind else "its token ids are not the student's"
            raise ValueError(
                f"the server at {self.client.url} tells nothing of token {where + 1} of sample {sample}: {why}"
            )
        for place, found in enumerate(told):
            self._check_numbers(found, sample, place + 1, k)
        return told

    def _check_numbers(self, found: Mapping[int, tuple[float, Any, Any]], sample: Any, place: int, k: int) -> None:
        values = [value for value, _, _ in found.values()]
        where = f"the server at {self.client.url}, token {place} of sample {sample}"
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{where}: a log-probability is not finite; serve the model in bfloat16 or float32")
        if max(values) > _ABOVE_ZERO or math.fsum(map(math.exp, values)) > _SUM:
            raise ValueError(
                f"{where}: its numbers are no log-probabilities: the largest is {max(values):.3g}, and the "
                f"probabilities sum to {math.fsum(map(math.exp, values)):.4g}"
            )
        if len(found) < k:
            raise ValueError(
                f"{where}: it gives {len(found)} log-probabilities where {k} were asked for; start it with "
                f"--max-logprobs {k}, or set top_k to {len(found)}"
            )

    def _likeliest(self, row: Row, k: int) -> tuple[Tensor, Tensor]:
        """Ids [n, k] and log-probabilities [n, k] at the positions that predict a label."""
        told = self._told(row, k)
        ids, log_probs = [], []
        for place in predicting(row).tolist():
            ordered = sorted(told[place].items(), key=lambda item: (item[1][1] or 0, -item[1][0]))[:k]
            # rows beyond the tokenizer are padding of the teacher's vocabulary: what little they have goes to the tail
            kept = [(token, value) for token, (value, _, _) in ordered if token < self.vocabulary]
            lost = k - len(kept)
            ids.append([token for token, _ in kept] + [_PADDING] * lost)
            log_probs.append([min(value, 0.0) for _, value in kept] + [-math.inf] * lost)
        return torch.tensor(ids, dtype=torch.int32).view(-1, k), torch.tensor(log_probs).view(-1, k)

    def _no_states(self) -> NoReturn:
        raise ValueError(
            "a server gives no hidden states; store the likeliest tokens (TopKCache, teacher.store: top_k)"
        )


def _entries(position: Any) -> dict[int, tuple[float, int | None, str | None]]:
    found = position if isinstance(position, dict) else {}
    return {int(token): (_number(told.get("logprob")), told.get("rank"), told.get("decoded_token"))
            for token, told in found.items()}  # fmt: skip


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _plain(text: str) -> str:
    """Without the marks by which tokenizers write spaces and line ends."""
    return text.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n").strip()

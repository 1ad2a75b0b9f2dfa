"""The model `ladder_jax` of lm-evaluation-harness (package lm_eval).

Prompts become ids, and long ones are cut, as in the harness's own Hugging Face backend,
so that both give the same results on the same weights. The harness has no plug-ins:
this module must be imported before its command looks for the model. So this is its
command, with all its options:

    python -m ladder_jax.evaluation.harness run --model ladder_jax \
        --model_args path=runs/short --tasks arc_easy
"""

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ladder_jax import sampling
from ladder_jax.config import ConfigError, Decode, Mesh, require
from ladder_jax.data.chat_template import ChatTemplate, Refused
from ladder_jax.evaluation.scoring import Scorer, Window
from ladder_jax.loading import Loaded, load
from ladder_jax.serve.buckets import bucket_sizes, round_up
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.offline import row_seed
from ladder_jax.serve.request import QueueFull, Request

_Base: Any = object  # without lm_eval, as API pages are written
if importlib.util.find_spec("lm_eval") is not None:
    _Base = importlib.import_module("lm_eval.api.model").TemplateLM

# (context and continuation, ids of the context, ids of the continuation)
Pair = tuple[Any, list[int], list[int]]
_MAX_TOKENS = 256  # of an output whose task gives no limit, as in the harness
_END = "<<the last message ends here>>"  # looked for in the text of a template
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


def require_installed() -> None:
    """Raises ConfigError if lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks need lm-evaluation-harness: pip install 'ladder_jax[eval]'"
        )


class LadderLM(_Base):
    """A checkpoint as a model of lm_eval.

    Args:
      path: of a checkpoint, see loading.load; or the model itself, a Loaded.
      tensor: devices to shard the model over (default: see loading.load).
      step: of the checkpoint (default: the newest).
      max_length: the most tokens of prompt and continuation (default: the model's).
      add_bos_token: whether texts start with bos (default: as the tokenizer says).
      prefix_token_id: the context of a text without context (default: bos).
      batch_size: rows that are scored together, and slots of the engine. "auto": as
        batch_tokens says, and 16 slots.
      batch_tokens: tokens that are scored together.
      reduction: a name of reductions.REDUCTIONS, or "auto".
      seed: of requests that sample.
      device, max_batch_size: the harness's command gives them; they change nothing.
    """

    def __init__(
        self,
        path: str | Loaded,
        *,
        tensor: int | None = None,
        step: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        batch_tokens: int = 8192,
        reduction: str = "auto",
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f"model_args: {', '.join(unknown)} is not accepted: choose from path, "
                "tensor, step, max_length, add_bos_token, prefix_token_id, batch_size, "
                "batch_tokens, reduction, seed"
            )
        super().__init__()
        if not isinstance(path, Loaded):
            mesh = None if tensor is None else Mesh(data=1, tensor=tensor)
            path = load(str(path), step=step, mesh=mesh)
        self.loaded, self.tokenizer = path, path.tokenizer
        most = self.loaded.config.model.max_length
        self.max_length = most if max_length is None else max_length
        require(
            1 <= self.max_length <= most,
            "max_length",
            max_length,
            f"from 1 to model.max_length={most}",
        )
        self.rows = None if batch_size in (None, "auto") else int(batch_size)
        require(self.rows is None or self.rows >= 1, "batch_size", batch_size, ">= 1")
        self.batch_tokens, self.reduction = batch_tokens, reduction
        self.seed = seed
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id
        self._engine: Engine | None = None

    # ------------------------------------------------------------ ids

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without context."""
        return self.tokenizer.bos if self._prefix is None else self._prefix

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an output whose task gives no limit."""
        return _MAX_TOKENS

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text; names of special tokens become those tokens.

        add_special_tokens: whether bos comes first. None: as `add_bos_token` or the
        tokenizer says, but never before a text that starts with the name of the prefix
        token.
        """
        bos = add_special_tokens
        if bos is None:
            name = self.tokenizer.token_name(self.prefix_token_id)
            starts = name is not None and string.startswith(name)
            bos = False if starts else self.add_bos_token
        if not string:  # `prompt` starts a new document then
            first = self.tokenizer.prompt("a", bos=bos)[:1]
            return first if first == [self.tokenizer.bos] else []
        return self.tokenizer.prompt(string, bos=bos)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return self.tokenizer.decode(tokens)

    # ------------------------------------------------------------ likelihoods

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(
            self.loaded.model,
            self.loaded.config.model,
            self.loaded.mesh,
            length=self.max_length,
            batch_tokens=self.batch_tokens,
            batch_rows=self.rows,
            reduction=self.reduction,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability in nats, is greedy) of every continuation.

        A context that leaves no room loses its first ids. Continuations whose inputs
        are equal, or begin one another, share a row.
        """
        windows = []
        for _pair, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation has {len(continuation)} tokens: it must be at "
                    f"most max_length={self.max_length}"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            windows.append(Window(np.array(ids, np.int32), len(continuation)))
        description = "Running loglikelihood requests"
        with _bar(len(windows), description, disable_tqdm) as bar:
            scores = self._scorer.score(windows, share=True, progress=bar.update)
        answers = [
            (float(score.log_probs.sum(dtype=np.float64)), bool(score.is_greedy.all()))
            for score in scores
        ]
        for (pair, _context, _continuation), answer in zip(requests, answers):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of every text, in windows of max_length ids."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs: list[Pair] = []
        owners = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for number, (log_prob, _greedy) in zip(owners, answers):
            totals[number] += log_prob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------ generation

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Returns the text that follows every prompt, up to a stop string or eos.

        The engine decodes the requests together. A prompt that leaves no room for the
        output loses its first ids. Each request that samples has a seed of its own.
        """
        work = [
            self._submission(number, *request.args)
            for number, request in enumerate(requests)
        ]
        if not work:
            return []
        engine = self._engine_for(work)
        waiting = [_submit(engine, ids, options) for ids, options in work]
        texts = []
        with _bar(len(work), "Running generate_until requests", disable_tqdm) as bar:
            try:
                for request, handle in zip(requests, waiting):
                    texts.append(handle.result().text)
                    self.cache_hook.add_partial(
                        "generate_until", request.args, texts[-1]
                    )
                    bar.update()
            except BaseException:  # nobody else has a handle to end the others with
                for handle in waiting:
                    handle.cancel()
                raise
        return texts

    def _submission(
        self, number: int, context: str, gen_kwargs: dict[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        """Returns (ids, options of Engine.submit) of a request."""
        from lm_eval.models.utils import normalize_gen_kwargs

        options: dict[str, Any] = dict(
            normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        )
        until = [text for text in options.pop("until") if text]
        max_tokens = options.pop("max_gen_toks")
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        for name, value in list(options.items()):
            if name in _NEUTRAL and value == _NEUTRAL[name]:
                del options[name]
            elif name not in sampling.PARAMETERS:
                raise ConfigError(
                    f"generation_kwargs: {name}={value!r} is not accepted: choose from "
                    f"until, max_gen_toks, do_sample, {', '.join(sampling.PARAMETERS)}"
                )
        if options.get("temperature", 0.0) > 0:
            options.setdefault("seed", row_seed(self.seed, number))
        room = self.max_length - max_tokens
        require(
            max_tokens >= 1 and room >= 1,
            "max_gen_toks",
            max_tokens,
            f"from 1 to {self.max_length - 1}: less than max_length={self.max_length}",
        )
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        special = {text: self._special_id(text) for text in until}
        stops = [text for text, token in special.items() if token is None]
        stop_ids = [token for token in special.values() if token is not None]
        options |= dict(
            max_tokens=max_tokens,
            stop=stops,
            # A chat model may have further ids that end an answer.
            stop_token_ids=sorted(
                {self.tokenizer.eos, *self.tokenizer.eos_ids, *stop_ids}
            ),
        )
        return ids, options

    def _special_id(self, text: str) -> int | None:
        """Returns the id of the special token of this name, or None."""
        ids = self.tokenizer.prompt(text, bos=False)
        is_special = len(ids) == 1 and self.tokenizer.token_bytes(ids[0], None) is None
        return ids[0] if is_special else None

    def _engine_for(self, work: list[tuple[list[int], dict[str, Any]]]) -> Engine:
        """Returns an engine with room for every request."""
        needed = max(len(ids) + options["max_tokens"] for ids, options in work)
        stop_ids = max(len(options["stop_token_ids"]) for _, options in work)
        engine = self._engine
        if (
            engine is None
            or engine.length < needed
            or engine.options.max_stop_ids < stop_ids
        ):
            sizes = bucket_sizes(min(64, self.max_length), self.max_length)
            decode_options = Decode(
                slots=self.rows or 16,
                max_length=round_up(sizes, needed),
                max_stop_ids=max(stop_ids, 4),
                burst_ms=0,
            )
            loaded = self.loaded
            engine = self._engine = Engine(
                loaded.model,
                loaded.config.model,
                loaded.mesh,
                decode_options,
                loaded.tokenizer,
                reduction=self.reduction,
            )
        return engine

    # ------------------------------------------------------------ chat

    @property
    def tokenizer_name(self) -> str:
        """A name that only this tokenizer has, for the harness's cache of prompts."""
        digest = hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest()[:16]
        return f"ladder_jax-{digest}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the tokenizer's chat template; None if the user asked for none."""
        if chat_template is False or chat_template is None:
            return None
        template = self.tokenizer.chat_template
        if template is None:
            raise ConfigError(
                "apply_chat_template is not accepted: this checkpoint's tokenizer has "
                "no chat template"
            )
        return template

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns messages (role and content each) as a prompt.

        add_generation_prompt: whether the assistant's turn begins at the end. Without
        it, the prompt ends within the last message.
        """
        self.chat_template(True)  # raises ConfigError if there is none
        messages = list(chat_history)
        if not add_generation_prompt:
            text = messages[-1]["content"] + _END
            messages[-1] = messages[-1] | {"content": text}
        try:
            text = self._render(messages, add_generation_prompt)
        except Refused as error:
            raise ConfigError(f"the chat template cannot be applied: {error}") from None
        return text if add_generation_prompt else text[: text.rindex(_END)]

    def _render(self, messages: list[dict[str, str]], is_prompt: bool) -> str:
        """Renders messages; without the system's, if the template refuses those."""
        try:
            return self._template.render(messages, is_prompt).text
        except Refused:
            others = [each for each in messages if each["role"] != "system"]
            if len(others) == len(messages):
                raise
            return self._template.render(others, is_prompt).text

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes into its results."""
        import jax

        leaves = jax.tree.leaves(self.loaded.model)
        model_config = self.loaded.config.model
        return dict(
            model_num_parameters=sum(x.size for x in leaves),
            model_dtype=model_config.dtype,
            model_residual=model_config.residual,
        )


def _submit(engine: Engine, ids: list[int], options: dict[str, Any]) -> Request:
    """Queues a request as soon as the queue has room."""
    while True:
        try:
            return engine.submit(ids, **options)
        except QueueFull:
            engine.step()


def _bar(total: int, description: str, disable: bool) -> Any:
    """A progress bar where stderr is a terminal."""
    return tqdm(total=total, desc=description, disable=True if disable else None)


def register() -> None:
    """Puts LadderLM into lm_eval's registry, under the name ladder_jax."""
    from lm_eval.api.registry import model_registry

    if "ladder_jax" not in model_registry:
        model_registry.register("ladder_jax", target=LadderLM)


def main(command: Callable[[], None] | None = None) -> None:
    """lm_eval's own command, with the model ladder_jax."""
    try:
        require_installed()
        from lm_eval.__main__ import cli_evaluate

        (command or cli_evaluate)()
    except ConfigError as error:
        print(f"ladder_jax.evaluation.harness: {error}", file=sys.stderr)
        sys.exit(2)


if _Base is not object:
    register()
if __name__ == "__main__":
    main()

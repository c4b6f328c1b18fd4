"""The options of ``nybble serve``: each one's name, type, default, help and panel.

The flags, the keys of ``--config``'s TOML file and the table in the documents are made from these
classes (see :mod:`nybble.server.cli.options_command`). A program that starts a server itself can
fill them in directly. A field is the flag of the same name: ``max_num_seqs`` is ``--max-num-seqs``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nybble.server.observability.logs import LogFormat

# One for each panel of `--help`.
_model = partial(typer.Option, rich_help_panel="Model")
_network = partial(typer.Option, rich_help_panel="Network")
_keys = partial(typer.Option, rich_help_panel="Keys")
_memory = partial(typer.Option, rich_help_panel="Memory and batching")
_adapters = partial(typer.Option, rich_help_panel="Adapters")
_storage = partial(typer.Option, rich_help_panel="Files and batches")
_training = partial(typer.Option, rich_help_panel="Fine-tuning")
_failures = partial(typer.Option, rich_help_panel="Failures")
_logs = partial(typer.Option, rich_help_panel="Logging")

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}iB": 1 << 10 * (i + 1) for i, unit in enumerate("KMGT")}
_UNITS |= {f"{unit}B": 1000 ** (i + 1) for i, unit in enumerate("KMGT")}


def parse_bytes(text: str | int) -> int:
    """Bytes of ``2GiB``, ``500MB`` or ``1073741824``. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", str(text).strip())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size such as 2GiB, 500MB or 1073741824")
    return int(float(match[1]) * _UNITS[match[2]])


def _parse_kv_cache_memory(text: str | int) -> int | None:
    return None if text == "auto" else parse_bytes(text)


def _root_path(text: str) -> str:
    path = text.rstrip("/")
    if path and not re.fullmatch(r"(/[^/?#\s]+)+", path):
        raise typer.BadParameter(f"{text!r} is not a path prefix such as /llm")
    return path


# For options in bytes. Their help texts say the default in units, so `--help` shows no number.
_SIZE: dict[str, Any] = {"parser": parse_bytes, "metavar": "SIZE", "show_default": False}

# An option that other commands have as well.
AliasesOption = Annotated[
    Path | None,
    _model(help="TOML file of alias = 'folder or hub name'.", dir_okay=False, exists=True),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], _model(help="auto: the GPU, if there is one.")
]
DtypeOption = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    _model(help="Data type of activations and KV cache."),
]
QuantizeOption = Annotated[
    Literal["nf4"] | None, _model(help="Round a 16-bit model to 4 bits while loading.")
]
HeadOption = Annotated[
    Literal["auto", "int8", "16bit"],
    _model(help="Output layer. auto: 8 bits beside layers in 4 bits; 16bit: as it is."),
]
KVCacheMemoryOption = Annotated[
    int | None,
    _memory(
        parser=_parse_kv_cache_memory,
        metavar="SIZE",
        help="For example 2GiB (default: auto: 1GiB on the CPU, most free memory of a GPU).",
    ),
]
KVCacheDtypeOption = Annotated[
    Literal["auto", "int8", "fp8"],
    _memory(help="int8 or fp8 halve the KV cache's memory (fp8: a GPU from Ada on)."),
]

LoraModulesOption = Annotated[
    list[str] | None,
    _adapters(
        metavar="NAME=PATH",
        help="Adapter to load at the start (folder or hub name), repeatable.",
    ),
]
MergeAdapterOption = Annotated[
    str | None,
    _adapters(
        help="Adapter (folder or hub name) to merge into the model, so that it does not slow "
        "requests. On a 4-bit base the first start calibrates, which takes minutes."
    ),
]
MaxLoraRankOption = Annotated[int, _adapters(help="Highest rank of an adapter.", min=1, max=512)]
LoraDtypeOption = Annotated[
    Literal["auto", "int8"],
    _adapters(
        help="int8 rounds adapters to 8 bits, with a scale for each row, which halves their memory "
        "and what a step reads of them (CPU); `nybble eval-adapter` measures what it costs."
    ),
]
ReasoningParserOption = Annotated[
    str,
    _network(
        help="Format of the model's reasoning, by vLLM's names (qwen3, deepseek_r1, granite, "
        "…), or 'none' (default: what the chat template shows)."
    ),
]
ToolCallParserOption = Annotated[
    str,
    _network(
        help="Format of the model's tool calls, by vLLM's names (hermes, llama3_json, mistral, "
        "…), or 'none' (default: what the chat template shows)."
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, under which names, and how its weights are held."""

    model: Annotated[
        str,
        _model(
            help="Model folder, .gguf file, hub name (org/name, org/name:Q4_K_M), alias, or 'demo'."
        ),
    ]
    served_model_name: Annotated[
        list[str] | None, _model(help="Name in the API, repeatable (default: --model).")
    ] = None
    aliases: AliasesOption = None
    quantize: QuantizeOption = None
    head: HeadOption = "auto"
    draft_model: Annotated[
        str | None,
        _model(
            help="Smaller model with the same tokenizer, or EAGLE-3 head of the model (folder, hub "
            "name, alias), that drafts tokens for --speculate."
        ),
    ] = None
    draft_quantize: Annotated[
        Literal["nf4"] | None,
        _model(help="Round a 16-bit draft model or MTP head to 4 bits while loading."),
    ] = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"
    threads: Annotated[
        int | None,
        _model(
            "--threads",
            "-t",
            help="Threads of the CPU kernels, in each process (default: OMP_NUM_THREADS, or one "
            "for each core).",
            min=1,
        ),
    ] = None
    tensor_parallel_size: Annotated[
        int,
        _model(
            help="GPUs (processes on the CPU) that compute the model together, each with a part of "
            "every weight. Outputs stay the same.",
            min=1,
        ),
    ] = 1
    max_model_len: Annotated[
        int | None, _model(help="Tokens of prompt and output together.", min=1)
    ] = None
    chat_template: Annotated[
        Path | None,
        _model(
            help="Jinja file to use in place of the model's chat template.",
            dir_okay=False,
            exists=True,
        ),
    ] = None
    matryoshka: Annotated[
        bool,
        _model(
            "--matryoshka",
            help="Embeddings were trained to be cut short (Qwen3-Embedding), though config.json "
            "does not say so: requests may ask for fewer dimensions.",
        ),
    ] = False
    tune: Annotated[
        bool,
        _model(
            help="If the best configurations of the GPU kernels are not known, measure them at the "
            "start (in minutes) and keep them for later starts."
        ),
    ] = True
    deterministic: Annotated[
        bool,
        _model(
            "--deterministic",
            help="A request's logits are the same bit for bit alone and in any company. On a GPU "
            "this costs time; models and settings for which it does not hold are refused.",
        ),
    ] = False
    activations: Annotated[
        Literal["auto", "int8"],
        _model(
            help="int8: on a CPU, round what 4- and 8-bit weights are multiplied with to 8 bits, "
            "for each token and group. Faster, above all for prompts, and less exact.",
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Where to listen, which hosts and origins to accept, and how long shutting down may take."""

    host: Annotated[str, _network(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1"
    port: Annotated[int, _network(help="Port; 0: any free one.", min=0, max=65535)] = 8000
    uds: Annotated[
        Path | None,
        _network(help="Path of a Unix domain socket to listen on instead of --host and --port."),
    ] = None
    root_path: Annotated[
        str,
        _network(
            metavar="/PREFIX",
            callback=_root_path,
            show_default=False,
            help="Prefix of the path that a proxy does not remove from requests.",
        ),
    ] = ""
    ssl_certfile: Annotated[
        Path | None,
        _network(help="Certificate and its chain (PEM), for https.", exists=True, dir_okay=False),
    ] = None
    ssl_keyfile: Annotated[
        Path | None,
        _network(
            help="The certificate's key (PEM), if it is not in the same file.",
            exists=True,
            dir_okay=False,
        ),
    ] = None
    allowed_origins: Annotated[
        list[str] | None,
        _network(help="Origin whose pages may call the API, or '*', repeatable (default: none)."),
    ] = None
    allowed_hosts: Annotated[
        list[str] | None,
        _network(
            help="Name to accept in requests' Host header besides localhost and IP addresses, or "
            "'*', repeatable. Only checked without keys on a loopback address."
        ),
    ] = None
    no_console: Annotated[bool, _network("--no-console", help="No page at /.")] = False
    unknown_fields: Annotated[
        Literal["refuse", "warn", "ignore"],
        _network(
            help="Unknown fields in requests: refuse the request, ignore them and log each name "
            "(warn), or ignore them."
        ),
    ] = "refuse"
    trust_request_chat_template: Annotated[
        bool,
        _network(
            "--trust-request-chat-template",
            help="Accept chat templates in requests; they run in a sandbox.",
        ),
    ] = False
    reasoning_parser: ReasoningParserOption = "auto"
    tool_call_parser: ToolCallParserOption = "auto"
    response_store: Annotated[
        Path | None,
        _network(
            help="File in which /v1/responses keeps responses, for previous_response_id and "
            "background (default: they are not kept).",
            dir_okay=False,
        ),
    ] = None
    response_store_size: Annotated[
        int,
        _network(**_SIZE, help="Most bytes of one tenant's responses together (default: 256MiB)."),
    ] = 256 << 20
    shutdown_timeout: Annotated[
        float, _network(help="Seconds which requests in flight have to finish.", min=0)
    ] = 30


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """Who may use the API.

    api_key: keys, any of which is accepted. Without keys and tenants the API is open.
    """

    api_key: Annotated[
        list[str] | None,
        _keys(help="Key which requests must have, repeatable (default: none needed)."),
    ] = None
    tenants: Annotated[
        Path | None,
        _keys(
            help="TOML file of tenants: keys, limits, weights. Read again on SIGHUP.",
            exists=True,
            dir_okay=False,
        ),
    ] = None
    quota_store: Annotated[
        str | None,
        _keys(
            metavar="URL",
            help="Redis or Valkey in which tenants' rates and running requests are counted over "
            "all servers: redis://HOST:6379/0, rediss://, unix://PATH (default: each server "
            "counts its own).",
        ),
    ] = None
    quota_store_failure: Annotated[
        Literal["open", "closed"],
        _keys(
            help="While the store does not answer: count in this server alone (open), or refuse "
            "tenants' requests with 503 (closed).",
        ),
    ] = "open"
    admin_key: Annotated[
        list[str] | None, _keys(help="Key for administration, repeatable (default: off).")
    ] = None


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The KV cache, and how much is computed at once or may wait.

    kv_cache_memory: bytes; None for ``auto``.
    """

    kv_cache_memory: KVCacheMemoryOption = None
    kv_cache_dtype: KVCacheDtypeOption = "auto"
    max_num_seqs: Annotated[int, _memory(help="Sequences computed in one step.", min=1)] = 64
    max_batched_tokens: Annotated[
        int | None,
        _memory(
            help="Tokens computed in one step (default: 512 on a GPU; 128 on the CPU, because a "
            "step of many tokens takes long there and delays other requests).",
            min=1,
        ),
    ] = None
    speculate: Annotated[
        Literal["off", "ngram", "draft", "mtp", "auto"] | None,
        _memory(
            help="Verify several tokens in a step which are drafted: 'ngram' from what a sequence "
            "repeats (prompt lookup), 'draft' by --draft-model, 'mtp' by the head that the model's "
            "checkpoint brings (multi-token prediction), 'auto' by whichever there is, and only as "
            "many as pay by the steps measured so far. Outputs stay the same (default: off, or "
            "auto with --draft-model)."
        ),
    ] = None
    max_draft_tokens: Annotated[
        int, _memory(help="Most draft tokens of a sequence in one step.", min=1)
    ] = 8
    max_waiting: Annotated[
        int, _memory(help="Sequences queued beyond --max-num-seqs; more get 429.", min=0)
    ] = 256
    max_queue_seconds: Annotated[
        float,
        _memory(
            help="Longest predicted wait; beyond it requests get 429. It is predicted from the "
            "tokens that requests in flight need, the observed rate, and the tenant's share.",
            min=0,
        ),
    ] = 120


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """LoRA adapters: which ones, where they are, and the memory they get.

    lora_modules: each ``NAME=PATH``.
    lora_host_memory, lora_device_memory, lora_cache_size: bytes.
    """

    enable_lora: Annotated[
        bool,
        _adapters(
            "--enable-lora",
            help="Reserve memory for adapters; the other adapter options imply it.",
        ),
    ] = False
    lora_modules: LoraModulesOption = None
    merge_adapter: MergeAdapterOption = None
    lora_root: Annotated[
        list[Path] | None,
        _adapters(
            help="Folder from which the API may load adapters (with --admin-key), repeatable.",
            exists=True,
            file_okay=False,
        ),
    ] = None
    lora_state: Annotated[
        Path | None,
        _adapters(
            help="File which lists the adapters loaded over the API, for the next start (default: "
            "in the cache, one per model, port and --lora-root).",
            dir_okay=False,
        ),
    ] = None
    lora_watch: Annotated[
        Path | None,
        _adapters(
            help="Folder of adapters, one per subfolder; they are loaded when they appear and "
            "unloaded when they are removed.",
            exists=True,
            file_okay=False,
        ),
    ] = None
    lora_source: Annotated[
        list[str] | None,
        _adapters(
            metavar="[NAMES=]URL",
            help="Where adapters are looked for when a request first names them, repeatable: a "
            "folder, s3://, gs:// or hf:// (any of fsspec's), with {name} for the name; only "
            "names that match NAMES, a shell pattern.",
        ),
    ] = None
    lora_registry: Annotated[
        str | None,
        _adapters(
            metavar="URL",
            help="Shared place to which adapters loaded over the API are written, and from which "
            "all servers that have it load them.",
        ),
    ] = None
    lora_cache_dir: Annotated[
        Path | None,
        _adapters(
            help="Folder for copies of adapters from --lora-source and --lora-registry (default: "
            "in the cache, one per model and port).",
            file_okay=False,
        ),
    ] = None
    lora_cache_size: Annotated[
        int, _adapters(**_SIZE, help="Most bytes of these copies (default: 20GiB).")
    ] = 20 << 30
    lora_refresh_seconds: Annotated[
        float,
        _adapters(
            help="How old the answer of a shared place may be: after so long another server's "
            "change is seen.",
            min=0.1,
        ),
    ] = 2.0
    max_loras: Annotated[int, _adapters(help="Most adapters in one step.", min=1)] = 8
    max_lora_rank: MaxLoraRankOption = 64
    lora_dtype: LoraDtypeOption = "auto"
    lora_own_settings: Annotated[
        bool,
        _adapters(
            "--lora-own-settings/--no-lora-own-settings",
            help="Whether requests to an adapter get the chat template, the generation config and "
            "the added tokens that are in its folder, if it has any.",
        ),
    ] = True
    lora_host_memory: Annotated[
        int,
        _adapters(
            **_SIZE,
            help="Host memory for adapters (default: 4GiB). On the CPU the slots refer to it.",
        ),
    ] = 4 << 30
    lora_device_memory: Annotated[
        int | None,
        _adapters(
            **_SIZE,
            help="A GPU's memory for adapters in slots (default: auto, for --max-loras of them of "
            "--max-lora-rank on all layers but experts).",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """Files over the API, and the batches of requests in them. Sizes are bytes."""

    batches: Annotated[
        bool,
        _storage(
            "--batches",
            help="Accept files of requests over the API, and batches, which run in the room that "
            "other requests leave.",
        ),
    ] = False
    state_dir: Annotated[
        Path | None,
        _storage(
            help="Folder for files, batches, jobs and trained adapters (default: "
            "~/.local/state/nybble); without --batches it implies --fine-tuning.",
            file_okay=False,
        ),
    ] = None
    max_file_size: Annotated[
        int,
        _storage(**_SIZE, help="Largest file that can be uploaded (default: 512MiB)."),
    ] = 512 << 20
    file_quota: Annotated[
        int,
        _storage(**_SIZE, help="Most bytes of one tenant's files together (default: 4GiB)."),
    ] = 4 << 30


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training over the API."""

    fine_tuning: Annotated[
        bool, _training("--fine-tuning", help="Accept training files and jobs over the API.")
    ] = False
    fine_tuning_threads: Annotated[
        int | None,
        _training(help="Threads of a job on the CPU (default: half of the processors).", min=1),
    ] = None
    fine_tuning_nice: Annotated[
        int,
        _training(
            help="Niceness of a job's process: at 19 it gets only what nothing else uses, and "
            "stands still beside servers that are always busy; at 0 it gets an equal share.",
            min=0,
            max=19,
        ),
    ] = 19


@dataclass(frozen=True, kw_only=True)
class OperationOptions:
    """What happens when the engine fails; logs and traces."""

    on_engine_failure: Annotated[
        Literal["exit", "restart"],
        _failures(
            help="After clients got their errors: exit (code 70) for a supervisor, or restart with "
            "the same weights, at most three times in ten minutes."
        ),
    ] = "exit"
    otlp_endpoint: Annotated[
        str | None, _logs(help="Where to send OpenTelemetry traces: http://HOST:4318/v1/traces.")
    ] = None
    vllm_metrics: Annotated[
        bool,
        _logs(
            "--vllm-metrics",
            help="/metrics also under vLLM's names, as routers of the Gateway API inference "
            "extension (llm-d) ask for them: load, KV cache, and names of adapters in slots.",
        ),
    ] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _logs()] = "info"
    log_format: Annotated[
        LogFormat, _logs(help="json: one object per line, without progress bars.")
    ] = "text"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """All options, in groups."""

    model: ModelOptions
    network: NetworkOptions = NetworkOptions()
    keys: KeyOptions = KeyOptions()
    memory: MemoryOptions = MemoryOptions()
    adapters: AdapterOptions = AdapterOptions()
    storage: StorageOptions = StorageOptions()
    training: TrainingOptions = TrainingOptions()
    operation: OperationOptions = OperationOptions()

    @property
    def trains(self) -> bool:
        """Whether the server runs training jobs."""
        named = self.storage.state_dir is not None and not self.storage.batches
        return self.training.fine_tuning or named

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names in the API; the first is the model's own."""
        return tuple(self.model.served_model_name or [self.model.model])

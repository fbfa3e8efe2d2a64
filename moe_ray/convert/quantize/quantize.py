"""Writes a quantised copy of a checkpoint: compressed-tensors', which others read as well, or with ternary experts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from moe_ray.convert.directories import directory_at_once
from moe_ray.convert.quantize.calibration import WINDOW, CalibrationRun
from moe_ray.convert.quantize.calibration_text import calibration_windows
from moe_ray.convert.quantize.config import LayerReport, QuantizeConfig, QuantizeReport
from moe_ray.convert.quantize.experts import ExpertCodes, ExpertMatrices
from moe_ray.convert.quantize.integer_scheme import IntegerScheme
from moe_ray.convert.quantize.layer import ENOUGH, round_attention, round_experts, round_experts_blindly
from moe_ray.convert.quantize.scheme import Scheme
from moe_ray.convert.recipe import Progress, no_progress
from moe_ray.convert.shards import ShardWriter, place_of, write_json
from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.torch.trunk import LayerTensors
from moe_ray.model.families import Role, Weight
from moe_ray.model.families.mixtral import MIXTRAL
from moe_ray.model.formats import GroupedCodes, Grouping
from moe_ray.model.formats.ternary import METHOD
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import matrices_of_expert, weights_of_trunk

logger = logging.getLogger(__name__)

REPORT_FILE: Final = "quantize.json"
EXPERTS: Final = r"re:.*\.experts\.\d+\.w[123]$"
ATTENTION: Final = r"re:.*\.self_attn\.[qkvo]_proj$"
GATES: Final = r"re:.*\.block_sparse_moe\.gate$"
QKV: Final[tuple[Role, ...]] = ("q", "k", "v")
WEIGHT_FILES: Final = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
NOT_COPIED: Final = ("config.json", "manifest.json", REPORT_FILE)


def quantize(
    source: Path,
    target: Path,
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008 - frozen
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
) -> QuantizeReport:
    """Writes the checkpoint `source`, its experts quantised, as a directory `target`.

    All or nothing: `target` appears complete, by a rename, or not at all. Weights are read, rounded and written one
    expert at a time, the trunk layer by layer; of the model, no more is held. A method with calibration holds
    the text's hidden states too, and quantises a layer by what reaches it through the quantised layers before it.
    Raises `CheckpointError`, and `ConfigError` for a text that cannot be read.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already")
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the model that is read: write the quantised one elsewhere")
    checkpoint = Checkpoint.open(source)
    try:
        check_surplus(checkpoint)
        shape = config_of_trunk(checkpoint)
        if shape.family is not MIXTRAL:
            raise CheckpointError(
                f"{source}: model_type is {shape.family.model_type!r}, supported: {MIXTRAL.model_type!r}; experts of "
                f"every family are quantised on load by `moe-ray serve --quantize`"
            )
        source_bytes = _check(checkpoint, shape, config)
        windows: list[list[int]] = []
        if config.method != "rtn":
            windows = calibration_windows(source, config.calibration_text, config.calibration_tokens, WINDOW)
        with directory_at_once(target) as work, torch.inference_mode():
            _copy_companions(source, work)
            with ShardWriter(work, shape.dtype, config.shard_bytes) as shards:
                layers = _Writing(checkpoint, shape, config, shards, progress).write(windows)
            write_json(work / "config.json", quantised_config(shape, config))
            report = QuantizeReport(shards.total_bytes, source_bytes, sum(map(len, windows)), tuple(layers))
            told = {**asdict(config), "calibration_text": str(config.calibration_text or "built in")}
            write_json(work / REPORT_FILE, {"config": told, **asdict(report)})
    finally:
        checkpoint.close()
    return report


def quantised_config(shape: ModelConfig, config: QuantizeConfig) -> dict[str, Any]:
    """The `config.json` of the result, with a `quantization_config`: compressed-tensors', or `METHOD`."""
    raw = {key: value for key, value in shape.raw.items() if key not in ("quantization_config", "compression_config")}
    told = {"quant_method": METHOD, "bits": config.bits} if config.is_ternary else _compressed_tensors(config)
    return {**raw, "tie_word_embeddings": shape.tie_word_embeddings, "quantization_config": told}


def _compressed_tensors(config: QuantizeConfig) -> dict[str, Any]:
    """Patterns are of the names in the checkpoint, as its own compressor writes them."""
    groups = {"group_0": _scheme(config.experts, EXPERTS)}
    ignore = ["lm_head", GATES]
    if config.attention is None:
        ignore.append(ATTENTION)
    else:
        groups["group_1"] = _scheme(config.attention, ATTENTION)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(how: Grouping, target: str) -> dict[str, Any]:
    return {
        "targets": [target],
        "weights": {
            "num_bits": how.bits,
            "type": "int",
            "symmetric": not how.offsets,
            "strategy": "group",
            "group_size": how.group,
            "actorder": "group" if how.reordered else None,
            "dynamic": False,
            "observer": "minmax",
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _check(checkpoint: Checkpoint, shape: ModelConfig, config: QuantizeConfig) -> int:
    """Bytes of the weights that will be read. Raises `CheckpointError` where one is missing or does not fit."""
    experts = [
        weight
        for layer in range(shape.num_hidden_layers)
        for expert in range(shape.num_local_experts)
        for weight in matrices_of_expert(shape, layer, expert)
    ]
    trunk = list(weights_of_trunk(shape))
    for weight in experts[:3]:
        config.check(weight)
    for weight in trunk:
        if weight.role in ("q", "out") and config.attention is not None:
            config.check(weight)
    return checkpoint.check([*trunk, *experts])


def _copy_companions(source: Path, work: Path) -> None:
    """Tokenizer, chat template, generation settings: every file beside the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_FILES) and path.name not in NOT_COPIED:
            shutil.copyfile(path, work / path.name)


class _Writing:
    """Reads, rounds and writes one checkpoint, from its first layer to its last."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: ModelConfig,
        config: QuantizeConfig,
        shards: ShardWriter,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._shape, self._config = checkpoint, shape, config
        self._shards, self._progress = shards, progress
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._trunk = {(weight.role, weight.layer): weight for weight in weights_of_trunk(shape)}

    def write(self, windows: list[list[int]]) -> Iterable[LayerReport]:
        """Write all weights, calibrated on `windows` where there are any; what each layer became."""
        embedding = self._read("embed")
        run = CalibrationRun(self._shape, windows, embedding) if windows else None
        self._shards.add(self._trunk["embed", None], embedding)
        del embedding
        reports = []
        for layer in range(self._shape.num_hidden_layers):
            reports.append(self._layer(layer, run))
            self._warn(layer, reports[-1])
        self._done(self._shape.num_hidden_layers, 0)
        last: tuple[Role, ...] = ("norm", "head")
        for role in last:
            if (role, None) in self._trunk:
                self._shards.add(self._trunk[role, None], self._read(role))
        return reports

    def _layer(self, layer: int, run: CalibrationRun | None) -> LayerReport:
        weights, heads = self._layer_weights(layer)
        attention = round_attention(run, weights, self._config)
        if attention is None:
            for role, values in zip(QKV, torch.split_with_sizes(weights.qkv, heads), strict=True):
                self._shards.add(self._trunk[role, layer], values)
            self._shards.add(self._trunk["out", layer], weights.out)
        else:
            self._add_attention(layer, heads, *attention)

        def read(index: int) -> ExpertMatrices:
            return ExpertMatrices(
                *(
                    self._checkpoint.read(weight, torch.float32)
                    for weight in matrices_of_expert(self._shape, layer, index)
                )
            )

        def take(index: int, codes: ExpertCodes) -> None:
            gate, up, down = matrices_of_expert(self._shape, layer, index)
            for weight, found in ((gate, codes.w1), (up, codes.w3), (down, codes.w2)):
                self._add_codes(weight, found, self._config.scheme)
            self._done(layer, index + 1)

        if run is None:
            report = round_experts_blindly(self._shape.num_local_experts, read, take, self._config)
        else:
            report, weights = round_experts(run, weights, read, take, self._config, self._dtype)
        kept: dict[Role, torch.Tensor] = {
            "input_norm": weights.input_norm,
            "post_norm": weights.post_norm,
            "router": weights.gate,
        }
        for role, values in kept.items():
            self._shards.add(self._trunk[role, layer], values)
        return report

    def _layer_weights(self, layer: int) -> tuple[LayerTensors, list[int]]:
        """One layer of the trunk as floats, and the rows of q, k and v."""
        q, k, v = (self._read(role, layer).float() for role in QKV)
        names: tuple[Role, ...] = ("out", "input_norm", "post_norm", "router")
        out, input_norm, post_norm, gate = (self._read(role, layer).float() for role in names)
        return LayerTensors(input_norm, torch.cat((q, k, v)), out, post_norm, gate), [len(q), len(k), len(v)]

    def _add_attention(self, layer: int, heads: list[int], qkv: GroupedCodes, out: GroupedCodes) -> None:
        start, scheme = 0, IntegerScheme(out.grouping)
        for role, rows in zip(QKV, heads, strict=True):
            self._add_codes(self._trunk[role, layer], qkv.rows(slice(start, start + rows)), scheme)
            start += rows
        self._add_codes(self._trunk["out", layer], out, scheme)

    def _add_codes(self, weight: Weight, codes: GroupedCodes, scheme: Scheme) -> None:
        self._shards.add_tensors(weight, scheme.pack(place_of(weight), codes))

    def _read(self, role: Role, layer: int | None = None) -> torch.Tensor:
        return self._checkpoint.read(self._trunk[role, layer], self._dtype)

    def _done(self, layer: int, experts: int) -> None:
        count = self._shape.num_local_experts
        self._progress("quantise", layer * count + experts, self._shape.num_hidden_layers * count)

    def _warn(self, layer: int, report: LayerReport) -> None:
        few = [f"expert {expert}: {count}" for expert, count in enumerate(report.tokens) if count < ENOUGH]
        if few:
            logger.warning(
                "layer %d: few tokens of the calibration text reach %s; other experts' tokens are mixed in up to %d",
                *(layer, ", ".join(few), ENOUGH),
            )

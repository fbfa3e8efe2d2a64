"""Every metric of GET /metrics that comes from requests or trunks: one literal table for each kind of source."""

from __future__ import annotations

from typing import Final

# Attribute of `RequestCounts` → name, help. Those of vLLM have its label, the served model's name.
VLLM_HISTOGRAMS: Final = {
    "first_token_s": ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token."),
    "token_gap_s": ("vllm:inter_token_latency_seconds", "Between two tokens, or steps with several, of a sequence."),
    "per_token_s": ("vllm:request_time_per_output_token_seconds", "Mean time per token after the first, by sequence."),
    "whole_s": ("vllm:e2e_request_latency_seconds", "From a request's arrival to its end."),
    "queue_s": ("vllm:request_queue_time_seconds", "Wait in the trunk before a sequence was first computed."),
    "prefill_s": ("vllm:request_prefill_time_seconds", "From the first computation to the first token."),
    "decode_s": ("vllm:request_decode_time_seconds", "From the first token to the last one."),
    "inference_s": ("vllm:request_inference_time_seconds", "From the first computation to the last token."),
    "prompt_length": ("vllm:request_prompt_tokens", "Prompt tokens of a sequence."),
    "output_length": ("vllm:request_generation_tokens", "Generated tokens of a sequence."),
    "asked_tokens": ("vllm:request_params_max_tokens", "The most tokens that a sequence might have had."),
    "num_choices": ("vllm:request_params_n", "Sequences of a request."),
    "longest_output": ("vllm:request_max_num_generation_tokens", "Generated tokens of a request's longest sequence."),
}
VLLM_COUNTERS: Final = {
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens of sequences that have a first token."),
    "output_tokens": ("vllm:generation_tokens", "Tokens generated."),
    "cached_tokens": ("vllm:prompt_tokens_cached", "Prompt tokens that were found in the prefix cache."),
}
TGI_HISTOGRAMS: Final = {
    "job_s": ("tgi_request_duration", "Seconds from a request's arrival to its end."),
    "job_parse_s": ("tgi_request_validation_duration", "Seconds of parsing and tokenizing."),
    "job_queue_s": ("tgi_request_queue_duration", "Seconds of waiting in the trunk."),
    "job_inference_s": ("tgi_request_inference_duration", "Seconds of computing."),
    "job_per_token_s": ("tgi_request_mean_time_per_token_duration", "Seconds of computing, per generated token."),
    "job_prompt_length": ("tgi_request_input_length", "Prompt tokens."),
    "job_output_length": ("tgi_request_generated_tokens", "Generated tokens."),
    "job_asked_tokens": ("tgi_request_max_new_tokens", "The most tokens that were asked for."),
    "extra_tokens": ("tgi_request_skipped_tokens", "Tokens of a step beyond its first, by speculative decoding."),
}
# Counters without `_total`, as TGI's are: for OpenMetrics they have no type.
TGI_COUNTERS: Final = {
    "jobs": ("tgi_request_count", "Requests."),
    "jobs_done": ("tgi_request_success", "Requests that ended well."),
}
OWN_COUNTERS: Final = {
    "degraded_tokens": ("moe_ray_gateway_degraded_tokens", "Tokens computed without one of their experts."),
}

# Field of `pb.TrunkLoad` or `pb.TrunkCounters` → name, help; with the trunk that it is about as `engine`.
TRUNK_GAUGES: Final = {
    "num_running": ("vllm:num_requests_running", "Sequences that a trunk computes, of all gateways."),
    "num_waiting": ("vllm:num_requests_waiting", "Sequences that wait in a trunk, of all gateways."),
}
TRUNK_COUNTERS: Final = {
    "prefix_query_tokens": ("vllm:prefix_cache_queries", "Tokens that were looked up in the prefix cache."),
    "prefix_hit_tokens": ("vllm:prefix_cache_hits", "Tokens that were found in the prefix cache."),
    "preemptions": ("vllm:num_preemptions", "Sequences preempted for want of KV blocks."),
    "drafts": ("vllm:spec_decode_num_drafts", "Runs of guessed tokens."),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Guessed tokens that were verified."),
    "accepted_draft_tokens": ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that came true."),
}
# Stage of a step (engine/step_times.py) → name, help; with `method`.
TGI_STAGES: Final = {
    "schedule": ("tgi_batch_concat_duration", "Seconds of choosing a step's batch."),
    "forward": ("tgi_batch_forward_duration", "Seconds of a step's forward pass."),
    "sample": ("tgi_batch_decode_duration", "Seconds of a step's sampling."),
    "update": ("tgi_batch_filter_duration", "Seconds of taking in a step's tokens, finished sequences out."),
}
STEPS: Final = ("tgi_batch_inference_duration", "Seconds of a whole step.")
STEP_TOKENS: Final = ("vllm:iteration_tokens_total", "Tokens of a step.")
STEP_SEQUENCES: Final = ("tgi_batch_next_size", "Sequences of a step.")

# Of an expert's replica in what GET /experts answers → name, help.
REPLICA_GAUGES: Final = {
    "busy": ("moe_ray_expert_busy_fraction", "Share of the last 10 s that a replica computed."),
    "queue_ms": ("moe_ray_expert_queue_wait_ms", "Mean wait of a call in the last 10 s."),
    "rows_per_call": ("moe_ray_expert_rows_per_call", "Mean rows of a call in the last 10 s."),
    "queued_rows": ("moe_ray_expert_queued_rows", "Rows waiting or being computed."),
    "rows_per_s": ("moe_ray_expert_rows_per_second", "Rows of one expert in the last 10 s."),
}
LAYER_ROWS: Final = ("moe_ray_expert_layer_rows", "Rows of one layer of an expert in the last 10 s, of all replicas.")
MOST_LAYER_SERIES: Final = 512
"""Where layers times experts are more, their rows are only in Ray's metrics."""

"""The stateful processes: generators, learner ranks, reference, reward workers (vLLM and DeepSpeed live here)."""

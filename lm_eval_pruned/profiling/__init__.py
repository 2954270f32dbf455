"""Latency, throughput, memory and energy over sizes."""

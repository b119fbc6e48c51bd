"""Hours of traffic, and whether memory, descriptors, threads and latency stay where they are."""

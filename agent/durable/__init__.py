"""Durable delivery: requests that wait on the disk for their answer, and answers that wait for their receiver."""

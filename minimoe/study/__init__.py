"""Commands that look at models and runs: inspect, compare, bench, eval and convert."""

"""What a trained model is worth: bits per byte, count-model baselines, routing statistics, suites."""

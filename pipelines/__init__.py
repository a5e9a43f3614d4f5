"""The chain as one Kubeflow pipeline: composed, compiled, run locally."""

"""The chain's steps as Kubeflow components: thin, one folder each, all of their work done by `danceopd`."""

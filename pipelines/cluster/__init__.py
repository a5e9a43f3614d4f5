"""Training jobs on a Kubernetes cluster: made, submitted, watched, cancelled, without duplicates or orphans."""

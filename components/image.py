"""The one container image all components run in; a compile replaces it (`danceopd pipeline compile --image`)."""

IMAGE = "danceopd:dev"

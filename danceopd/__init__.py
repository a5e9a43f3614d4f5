"""DanceOPD: on-policy distillation of many velocity fields into one flow-matching student."""

__version__ = "0.1.0"

"""Names in every evaluation: its fields, besides the teachers, and the judge."""

BASE, STUDENT = "base", "student"
JUDGE = "judge"  # the metric tool that is asked, and not loaded

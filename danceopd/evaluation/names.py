"""The fields that every evaluation has, besides the teachers."""

BASE, STUDENT = "base", "student"

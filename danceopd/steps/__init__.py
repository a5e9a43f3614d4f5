"""The chain's steps over a workspace folder: base, data, teachers, student, evaluation, registration.

Command line, Kubeflow components and GPU jobs all call these functions; each step is one file.
"""

from danceopd.steps.base import resolve_base
from danceopd.steps.champion import measure_champion
from danceopd.steps.data import build_data, build_share, data_revision, track_data
from danceopd.steps.encodings import cache_encodings
from danceopd.steps.evaluation import evaluate_student, lineage, shortfalls
from danceopd.steps.registration import move_champion, register_student, registration_facts, require_registered
from danceopd.steps.run import Run, open_run
from danceopd.steps.student import distill_student, open_training, student_folder
from danceopd.steps.teacher_map import map_teachers
from danceopd.steps.teachers import finetune_teacher
from danceopd.workspace import STEP, Product, code_revision, open_product

__all__ = [
    "STEP",
    "Product",
    "Run",
    "build_data",
    "build_share",
    "cache_encodings",
    "code_revision",
    "data_revision",
    "distill_student",
    "evaluate_student",
    "finetune_teacher",
    "lineage",
    "map_teachers",
    "measure_champion",
    "move_champion",
    "open_product",
    "open_run",
    "open_training",
    "register_student",
    "registration_facts",
    "require_registered",
    "resolve_base",
    "shortfalls",
    "student_folder",
    "track_data",
]

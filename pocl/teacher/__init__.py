"""Where the teacher's distributions come from: the model itself, or a store written once.

Hidden states with the teacher's head give the exact distribution over the vocabulary at any temperature, for H numbers
a token in place of V. The K likeliest tokens give what an engine or a server tells.
"""

from pocl.teacher.cache import HiddenStateCache
from pocl.teacher.choice import TeacherChoice, choose_teacher
from pocl.teacher.online import LikelyTokens, OnlineTeacher, Teacher, signal_of, vocabulary_of
from pocl.teacher.stored import StoredTeacher
from pocl.teacher.top_k import TopKCache

__all__ = [
    "HiddenStateCache",
    "LikelyTokens",
    "OnlineTeacher",
    "StoredTeacher",
    "Teacher",
    "TeacherChoice",
    "TopKCache",
    "choose_teacher",
    "signal_of",
    "vocabulary_of",
]

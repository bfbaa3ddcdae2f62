"""Where the teacher's hidden states come from: the model itself, or a store written once.

With the teacher's head they give its exact distribution over the vocabulary at any temperature, for H numbers a token
in place of V.
"""

from pocl.teacher.cache import HiddenStateCache
from pocl.teacher.choice import TeacherChoice, choose_teacher
from pocl.teacher.online import OnlineTeacher, Teacher

__all__ = ["HiddenStateCache", "OnlineTeacher", "Teacher", "TeacherChoice", "choose_teacher"]

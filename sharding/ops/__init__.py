"""Operations that a plan may carry out by another kernel, or in another way, than they are written."""

from .attention import attention as attention

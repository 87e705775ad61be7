"""Operations: one folder each, with a reference that reads like the equation and the public op beside it."""

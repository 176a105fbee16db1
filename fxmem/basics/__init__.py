"""Words and numbers: errors, units, sizes, budgets, devices, polynomials."""

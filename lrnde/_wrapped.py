"""Solvers that add something to another solver's steps, and nothing else."""

import diffrax
from equinox import AbstractVar


class AbstractTransparentSolver(diffrax.AbstractWrappedSolver):
    """Wraps a solver and passes for it: the steps are the same.

    Subclasses give the `stepper`, a solver which may itself be one of these, and `init`
    and `step`, whose state is a pair of the stepper's state and their own.
    """

    stepper: AbstractVar[diffrax.AbstractSolver]

    @property
    def solver(self):
        # For diffrax to see what kind of solver is inside: it looks no deeper than one
        # level. All else is the stepper's.
        inner = self.stepper
        while isinstance(inner, diffrax.AbstractWrappedSolver):
            inner = inner.solver
        return inner

    @property
    def term_structure(self):
        return self.stepper.term_structure

    @property
    def interpolation_cls(self):
        return self.stepper.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.stepper.term_compatible_contr_kwargs

    # diffrax looks for these two where it takes the solver for an implicit one, or for
    # one of its Runge-Kutta methods.
    @property
    def root_finder(self):
        return self.solver.root_finder

    @property
    def scan_kind(self):
        return self.solver.scan_kind

    def order(self, terms):
        return self.stepper.order(terms)

    def strong_order(self, terms):
        return self.stepper.strong_order(terms)

    def error_order(self, terms):
        return self.stepper.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.stepper.func(terms, t0, y0, args)

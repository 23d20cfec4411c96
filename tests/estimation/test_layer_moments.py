"""What a pass ends with: errors that name layer and batch."""

import pickle

from flaxbn.estimation.layer_moments import NotFiniteError


def test_the_error_goes_to_other_processes():
    error = NotFiniteError("block/norm", 3)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.layer) == (NotFiniteError, str(error), "block/norm")

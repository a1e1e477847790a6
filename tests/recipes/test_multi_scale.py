"""The recipe on scales in a tiny form."""


def test_gains_are_the_closed_form_and_coarse_structure_comes_first(run):
    options = ("--epochs", 16, "--gain-steps", 100, "--gain-batches", 128, "--channels", 8, "--val-every", 10)
    numbers = run("multi_scale", *options)
    assert numbers["blocks_gains_formula_difference"] < 1e-12
    for name in ("blocks", "pyramid"):
        for optimizer in ("SGD", "Adam"):
            assert numbers[f"{name}_gains_{optimizer}_128"] < 0.01
    for name in ("blocks", "cosines"):
        assert numbers[f"{name}_gains_trained_decoders"] < 1e-3
        # early: before the fine scale takes part
        assert numbers[f"{name}_coarse_first_fine_early"] >= 1 > numbers[f"{name}_at_once_fine_early"]
        assert numbers[f"{name}_coarse_first_coarse_early"] < 0.8
        for scale in ("fine", "middle", "coarse"):
            assert numbers[f"{name}_coarse_first_{scale}"] < 0.6

import json

from studies.landscape import main


def test_the_loss_before_and_after_from_images_to_a_figure(parts, tmp_path, capsys):
    small = ["--image-size", "64", "64", "--points", "3", "--directions", "2", "--meta-steps", "2"]
    main([str(parts / "train/good"), "--out", str(tmp_path / "out"), *small])
    said = capsys.readouterr().out
    assert "largest eigenvalue" in said
    names = ["landscape.json", "landscape.png", "landscape.svg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    found = json.loads((tmp_path / "out/landscape.json").read_text())
    assert found["images"] == 24
    assert found["before"]["surface"][1][1] == found["after"]["surface"][1][1] == 0  # the centre
    assert found["before"]["loss"] != found["after"]["loss"]

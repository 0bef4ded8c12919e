from vlkern import data
from vlkern.data import speed


def test_prints_all_figures(monkeypatch, capsys):
    monkeypatch.setattr(speed, "_ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["speed", str(data.clipart_mini() / "test.tar"), "--size", "16"])
    speed.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("index of 400 pairs: ")
    assert [line.split(":")[0] for line in lines[1:]] == ["0 workers", "1 workers", "2 workers"]
    assert all(float(line.split()[2]) > 0 for line in lines[1:])

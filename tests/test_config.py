from typing import ClassVar, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from sparsemix.config import Config, ConfigError, apply_overrides, config_hash, load_yaml, nearest, parse, to_yaml


class Shape(Config):
    family: ClassVar[dict[str, type[Config]] | None] = {}


class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = Field(gt=0)


class Polygon(Shape):
    kind: Literal["polygon"] = "polygon"
    corners: int = Field(default=3, ge=3)
    solid: bool = True
    seen: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "Polygon":
        self.rule(self.seen <= self.corners, "seen", f"must lie in [0, corners={self.corners}]")
        return self


class Drawing(Config):
    title: str = "none"
    paper: Literal["a4", "letter"] = "a4"
    scale: float = 1.0
    margin: int | None = None
    shapes: tuple[Shape, ...] = ()
    frame: Shape | None = None


def message(raw, cls=Drawing):
    with pytest.raises(ConfigError) as caught:
        parse(cls, raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (
            {"titel": "x"},
            "titel=x is no setting here; did you mean 'title'? (known: title, paper, scale, margin, shapes, frame)",
        ),
        (
            {"frame": {"kind": "cirle", "radius": 1}},
            "frame.kind=cirle is none of circle, polygon; did you mean 'circle'?",
        ),
        ({"frame": {"radius": 1}}, "frame.kind=None is none of circle, polygon"),
        ({"frame": {"kind": {"a": 1}}}, "frame.kind=dict is none of circle, polygon"),
        ({"shapes": [{"kind": "circle", "radius": 1}, {"kind": "circle"}]}, "shapes.1.radius is missing"),
        ({"shapes": [{"kind": "circle", "radius": -2}]}, "shapes.0.radius=-2 input should be greater than 0"),
        ({"shapes": [{"kind": "polygon", "seen": 9}]}, "shapes.0.seen=9 must lie in [0, corners=3]"),
        ({"shapes": [{"kind": "polygon", "corners": True}]}, "shapes.0.corners=True must not be true or false"),
        ({"margin": False}, "margin=False must not be true or false"),
        ({"scale": True}, "scale=True must not be true or false"),
        ({"scale": float("nan")}, "scale=nan input should be a finite number"),
        ({"scale": "wide"}, "scale=wide input should be a valid number, unable to parse string as a number"),
        ({"paper": "a\n5"}, "paper=a 5 input should be 'a4' or 'letter'"),
        ({"paper": "a5"}, "paper=a5 input should be 'a4' or 'letter'"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line_with_its_path_value_and_rule(raw, wanted):
    assert message(raw) == wanted


def test_every_wrong_setting_is_named_at_once():
    assert message({"scale": "wide", "paper": "a5"}).count("; ") == 1


def test_only_switches_take_true_and_false():
    assert parse(Shape, {"kind": "polygon", "solid": False}).solid is False


def test_kinds_find_their_class_and_keep_their_settings_in_the_dump():
    drawing = parse(Drawing, {"shapes": [{"kind": "circle", "radius": 2}, {"kind": "polygon"}]})
    assert [type(shape) for shape in drawing.shapes] == [Circle, Polygon]
    assert drawing.model_dump()["shapes"][0] == {"kind": "circle", "radius": 2.0}


def test_settings_cannot_be_changed_but_replaced():
    circle = parse(Shape, {"kind": "circle", "radius": 2})
    with pytest.raises(ValueError, match="frozen"):
        circle.radius = 3
    assert circle.replace(radius=3).radius == 3
    assert circle.radius == 2
    with pytest.raises(ValueError, match="greater than 0"):
        circle.replace(radius=-1)


def test_yaml_reads_back_to_equal_settings():
    drawing = parse(Drawing, {"title": "1e3", "scale": 3e-4, "shapes": [{"kind": "polygon", "corners": 5}]})
    assert parse(Drawing, yaml.safe_load(to_yaml(drawing))) == drawing


def test_the_hash_names_the_settings_and_not_how_they_were_written():
    short = parse(Drawing, {"frame": {"kind": "polygon"}})
    long = parse(Drawing, {"frame": {"seen": 0, "corners": 3, "kind": "polygon"}, "scale": 1})
    assert config_hash(short) == config_hash(long)
    # Folders are named by it, so it must not move between releases without a reason.
    assert config_hash(parse(Shape, {"kind": "circle", "radius": 2})) == "25d20c75ea"
    assert len({config_hash(parse(Drawing, {"scale": scale})) for scale in (1, 2, 3)}) == 3


RAW = {"lr": 1, "model": {"blocks": [{"kind": "a", "width": 1}, {"kind": "b", "ffn": {"kind": "moe", "top_k": 1}}]}}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("lr=3e-4", {"lr": 3e-4}),
        ("lr=1e13", {"lr": 1e13}),
        ("lr=null", {"lr": None}),
        ("lr=[1, 2]", {"lr": [1, 2]}),
        ("name=a=b", {"name": "a=b"}),
        ("new.deep=true", {"new": {"deep": True}}),
    ],
)
def test_overrides_are_yaml_values_and_numbers_are_numbers(override, wanted):
    assert apply_overrides(RAW, [override]) == RAW | wanted


def test_overrides_reach_into_lists_and_leave_the_original_alone():
    before = yaml.safe_dump(RAW)
    changed = apply_overrides(RAW, ["model.blocks.1.ffn.top_k=2", "model.blocks.0=null"])
    assert changed["model"]["blocks"] == [None, {"kind": "b", "ffn": {"kind": "moe", "top_k": 2}}]
    assert yaml.safe_dump(RAW) == before


def test_a_new_kind_clears_the_settings_of_the_old_one_and_the_same_kind_does_not():
    ffn = "model.blocks.1.ffn"
    changed = apply_overrides(RAW, [f"{ffn}.kind=peer", f"{ffn}.top_k=4"])
    assert changed["model"]["blocks"][1]["ffn"] == {"kind": "peer", "top_k": 4}
    assert apply_overrides(RAW, [f"{ffn}.kind=moe"]) == RAW


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("lr", "override 'lr' must look like setting.name=value"),
        ("=3", "override '=3' must look like setting.name=value"),
        ("lr=[1", "lr=[1 is not a YAML value; quote it"),
        ("model.blocks.2.width=1", "model.blocks.2: '2' must be a list position from 0 to 1"),
        ("model.blocks.-1=1", "model.blocks.-1: '-1' must be a list position from 0 to 1"),
        ("model.blocks.first=1", "model.blocks.first: 'first' must be a list position from 0 to 1"),
        ("lr.peak=1", "lr.peak: lr is a single value and has no settings inside"),
        ("lr.peak.step=1", "lr.peak: there are no settings below a single value"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(override, wanted):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RAW, [override])
    assert str(caught.value) == wanted


def test_a_recipe_file_that_cannot_be_read_says_why_in_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    cases = {None: "no such file", "a: [1": "not valid YAML", "- 1": r"must hold settings \(a mapping\), not list"}
    for text, wanted in cases.items():
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=wanted) as caught:
            load_yaml(path)
        assert "\n" not in str(caught.value)
    path.write_text("a: 1")
    assert load_yaml(path) == {"a": 1}


def test_the_nearest_name_is_offered_only_when_it_is_near():
    assert nearest("top_kk", ["top_k", "d_ff"]) == "; did you mean 'top_k'?"
    assert nearest("zzz", ["top_k", "d_ff"]) == ""

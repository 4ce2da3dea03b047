"""Groups: the names of parts, and the images that belong together."""

from pathlib import Path

import pytest

from flawmask.data.groups import keys, merge, names, part_named, parts_of
from flawmask.data.layouts import Sample


@pytest.mark.parametrize(
    ("pattern", "name", "part"),
    [
        (r"^(tile[0-9]+)", "tile017_exp3_num_33395.jpg", "tile017"),
        (r"^tile[0-9]+", "tile017_exp3_num_33395.jpg", "tile017"),
        (r"^tile([0-9]+)", "tile017_exp3_num_33395.jpg", "017"),
        (r"lot([0-9]+).*part([0-9]+)", "lot3_part12_b.png", "3_12"),
        (r"lot([0-9]+)?_part([0-9]+)", "lot_part12_b.png", "12"),
        (r"part([0-9]+)?", "part_b.png", "part"),
        (r"^(tile[0-9]+)", "plate017.jpg", None),
        (r"(tile[0-9]+)?", "plate017.jpg", None),  # it matches the empty text before the name, which is not a part
    ],
)
def test_the_name_of_a_part_is_what_the_pattern_matches(pattern: str, name: str, part: str | None) -> None:
    assert part_named(pattern, name) == part


def test_a_part_may_be_named_by_the_layout_by_its_files_by_both_or_by_neither() -> None:
    def sample(name: str, group: str | None) -> Sample:
        return Sample(
            image=Path(name),
            defect_type="good",
            group=group,
            origin="test",
            original_file=f"part/{name}",
            good_folder="test/good",
        )

    assert parts_of(sample("a1_x.png", None), r"^a[0-9]") == ["a1"]
    assert parts_of(sample("a1_x.png", "7"), r"^a[0-9]") == ["7", "a1"]
    assert parts_of(sample("a1_x.png", "7"), None) == ["7"]
    assert parts_of(sample("b1_x.png", None), r"^a[0-9]") == []


def test_images_belong_together_through_equal_pixels_equal_parts_or_a_chain_of_both() -> None:
    files = ["1.png", "2.png", "3.png", "4.png", "5.png", "6.png"]
    contents, parts = ["x", "y", "y", "z", "v", "v"], [["a"], ["a"], ["b"], ["c"], [], []]
    groups = merge([keys(content, of_image) for content, of_image in zip(contents, parts, strict=True)])
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[2], groups[3], groups[4]}) == 3
    assert groups[4] == groups[5]
    assert names(groups, parts, files) == ["a = b", "a = b", "a = b", "c", "5.png", "5.png"]

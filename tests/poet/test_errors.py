import pytest

from poet import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.VocabularyError, ValueError),
        (errors.CheckpointError, RuntimeError),
        (errors.MediaError, OSError),
    ],
)
def test_each_error_can_be_caught_as_poets_and_as_pythons(error: type[Exception], builtin: type[Exception]) -> None:
    for caught_as in (errors.PoetError, builtin):
        with pytest.raises(caught_as, match="must be 3, is 5"):
            raise error("must be 3, is 5")


def test_every_error_that_the_module_offers_is_one_of_poets() -> None:
    offered = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(error, errors.PoetError) for error in offered)
    assert len(offered) == 6


def test_media_errors_read_as_their_message_though_os_errors_need_a_number() -> None:
    assert str(errors.MediaError("clip.mp4: holds no video")) == "clip.mp4: holds no video"
    assert str(errors.MediaError()) == ""


def test_the_tokenizers_errors_are_the_same_classes_not_copies() -> None:
    from poet_tokenizers import errors as tokenizer_errors

    for name in tokenizer_errors.__all__:
        assert getattr(errors, name) is getattr(tokenizer_errors, name)

"""What is handled and what is refused, row by row, with the tests that say so: the source of the
tables in docs/.

    python tests/handled.py          writes the tables into the pages of docs/, between their markers

Add a row in one line: what it is, and where it is tested (`file.py::test`, or `file.py::test[parameter]`; a
file's tests after the first one without the file's name). `zoo(...)` names entries of tests/zoo/others.py, from
which offsets and levels are taken. tests/test_handled.py checks that the pages hold what is written here and
that every test exists.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {"models": "docs/handled.md", "uses": "docs/uses.md", "refused": "docs/refusals.md"}
ARMT = ("(0,1) (1,0)", "s + l")
ZOO_TEST = "test_zoo_end_to_end.py::test_equal_for_any_number_of_segments"


@dataclass(frozen=True)
class Row:
    """One line of a table: cells of text, then the tests."""

    cells: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Each test with its file."""
        found, file = [], ""
        for test in self.tests:
            file, _, name = test.rpartition("::") if "::" in test else (file, "", test)
            found.append(f"{file}::{name}")
        return tuple(found)

    def __str__(self) -> str:
        by_file: dict[str, list[str]] = {}
        for test in self.ids:
            file, name = test.split("::", 1)
            by_file.setdefault(file, []).append(_shown(name))
        tests = "; ".join(f"`{file}`: {', '.join(dict.fromkeys(names))}" for file, names in by_file.items())
        return f"| {' | '.join(self.cells)} | {tests} |"


def _shown(name: str) -> str:
    match = re.fullmatch(r"(\w+)\[(.*)\]", name)
    return f"`[{match[2]}]`" if match else f"`{name}`"


def model(text: str, *tests: str, offsets: str = ARMT[0], levels: str = ARMT[1]) -> Row:
    """A model, its dependence offsets and the levels it runs on."""
    return Row((text, offsets, levels), tests)


def zoo(text: str, *names: str, more: tuple[str, ...] = ()) -> Row:
    """Models of the zoo with equal offsets."""
    from zoo.others import ZOO

    stated = {(frozenset(ZOO[name].offsets), ZOO[name].skew, ZOO[name].n_layers) for name in names}
    offsets = {o for o, _, _ in stated}
    assert len(offsets) == len({k for _, k, _ in stated}) == 1, f"{names} have different offsets"
    found, skew, n_layers = next(iter(stated))
    below = {(ds, 1 - n_layers) for ds, dl in found if ds and dl == 1 - n_layers and skew == n_layers}
    text_of = {o: f"({o[0]},1-L)" if o in below else f"({o[0]},{o[1]})" for o in found}
    levels = {0: "l: all segments of a layer at once", 1: "s + l"}.get(skew or 0, f"{skew}s + l")
    if skew == n_layers:
        levels = "L·s + l: one cell after the other, with a warning"
    tests = tuple(f"{ZOO_TEST}[{name}]" for name in names)
    return Row((text, " ".join(text_of[o] for o in sorted(found)), levels), (*tests, *more))


def use(text: str, *tests: str) -> Row:
    """An input, an output or a way of use."""
    return Row((text,), tests)


def refused(text: str, happens: str, *tests: str) -> Row:
    """What is not handled, and what happens."""
    return Row((text, happens), tests)


def tables() -> dict[str, tuple[str, list[Row]]]:
    """By marker: the head of the table and its rows."""
    end, arch, guard = "test_end_to_end.py::", "test_architectures.py::", "test_changes.py::"
    mod = "test_module.py::"
    no, zooed, inputs = "test_refusals.py::", "test_zoo_end_to_end.py::", "test_inputs.py::"
    order, growing = "test_loop_order.py::", "test_growing_carries.py::"
    windows, periods = "test_windows.py::", "test_periods.py::"
    models = [
        model("ARMT, reference and authors' manner, on Llama, GPT-2, Qwen2", end + "test_armt_in_float64_for_any_number_of_segments", "test_armt_runs_on_diagonals"),
        model("ARMT on GPT-NeoX, Mistral, Gemma-2 (layers alternate in their masks)", arch + "test_armt"),
        model("ARMT without the gamma correction", arch + "test_armt_without_correction"),
        model("ARMT whose layers also see the keys and values of the segment before, on all six", arch + "test_armt_with_a_window_into_the_segment_before"),
        model("Mamba from transformers, read piece by piece with its cache", arch + "test_mamba_with_its_cache"),
        zoo("Memory tokens kept per layer; Infini-attention; carry in some layers only; kinds of layers in turn; one block for all layers", "parallel_rmt", "infini_attention", "block_recurrent", "alternating", "universal"),
        zoo("Attention, state-space and recurrent layers in one stack", "hybrid"),
        zoo("GRU and LSTM cells looped over time or layer by layer (a segment is one step)", "gru_time_major", "lstm_layer_major", "gru_residual", more=("test_stacked_lstm_cells_against_the_fused_lstm", "test_stacked_gru_cells_against_the_fused_gru")),
        zoo("State in buffers, in cache objects, in one tensor for all layers, stacked, in the segment loop itself", "buffer_copy", "cache_object", "sliced_state", "stacked_memories", "glue_update"),
        zoo("`copy_`, `add_`, `mul_`, `index_put_` on carries", "in_place", "buffer_copy"),
        zoo("Local and global layers in turn, rotary tables made once a segment for all of them", "local_global"),
        zoo("Carry read below its writer", "skewed", more=("test_the_skew_is_printed",)),
        zoo("Memories rolled down one layer between segments", "rolled_memories"),
        zoo("A carried view that the layer above overwrites", "alias_trap"),
        model("Caches of the keys and values of all earlier segments: joined in tuples, attributes and transformers' `DynamicCache`, masks of any form, grouped-query attention, rotary positions", growing + "test_equal_on_diagonals[triangle]", *(f"test_equal_on_diagonals[{name}]" for name in ("forms", "attribute", "written")), "test_chunked_prefill_of_a_decoder_with_its_cache", "test_ragged_ends_and_batches", "test_ragged_ends_have_rules", "test_gradients", "test_in_bands"),
        model("Layers with such a cache and recurrent ones in turn; both in one layer", growing + "test_equal_on_diagonals[hybrid]", "test_equal_on_diagonals[both]"),
        model("Lists of keys and values, or of memories of all earlier segments, joined whenever they are read; a mean over all of them", growing + "test_equal_on_diagonals[lists]", "test_equal_on_diagonals[memories]", "test_equal_on_diagonals[mean]"),
        zoo("Compressed older memory", "compressed_older"),
        zoo("Residual edges past a layer", "skip_connections"),
        zoo("Transformer-XL-like carry", "transformer_xl"),
        model("The same with a memory of two or three segments, kept by the layers or moved in the model's loop", windows + "test_all_segments_of_a_layer_at_once", "test_gradients", offsets="(0,1) (1,1) (2,1) ...", levels="l: all segments of a layer at once"),
        model("Windows of what a layer computes, cut and joined in place, rolled, longer than what is captured", windows + "test_a_window_longer_than_captures_is_a_carry", "test_gradients", "test_results_of_the_last_segments_alone"),
        model("Lists of the last few segments that fill up first, longer than what is captured", windows + "test_lists_that_are_full_after_seven_segments"),
        model("Segments that the model walks in equal parts, token by token say, each part through all layers; short last segments too", "test_finer.py::test_parts_are_the_segments_of_the_grid", "test_gradients", "test_ragged_ends_other_batches_and_one_segment", "test_rests_that_are_no_whole_parts", "test_saved"),
        model("Rules that repeat every two to four segments, each so many as one; any number of segments", periods + "test_any_number_of_segments", "test_gradients", "test_short_last_segments", "test_a_start_that_is_another_and_then_a_period", "test_texts_in_parts", "test_documents"),
        zoo("No carry at all", "no_carry", more=("test_rows.py::test_equal_block_by_block", "test_memory_does_not_grow_with_the_number_of_blocks")),
        zoo("Layers that are plain functions, no module", "plain_function", more=("test_repeats.py::test_equal_on_diagonals", "test_two_kinds_of_layers")),
        model("Several products of a layer on one line, or through one function", "test_repeats.py::test_equal_on_diagonals[one_line]", "test_equal_on_diagonals[helper]"),
        model("Layers outside, each walks the segments itself: over slices, by index after one reshape, into a buffer, memory tokens put in once", order + "test_whole_segments[Pieces]", *(f"test_whole_segments[{name}]" for name in ("Split", "Buffer", "Reshaped", "MemoryTokens", "Tokens", "KeptState")), "test_gradients", "test_it_is_the_schedule_of_the_other_order"),
        model("The same with all chunks at once before the loop: gated delta rule, einsum, short convolutions, token shifts", order + "test_whole_segments[DeltaRule]", "test_whole_segments[Products]", "test_whole_segments[Convolved]"),
        model("The same with layers and norms between that take the whole sequence row by row; layers that are no modules", order + "test_whole_segments[Mixed]", "test_whole_segments[TwoLists]", "test_whole_segments[Rows]", "test_whole_segments[Functions]", "test_ragged_ends"),
        model("A loop over layers in the model itself, in which some lists of modules are called for each segment and some once for all", order + "test_some_lists_called_for_each_segment_and_some_once"),
        model("Memories that stay as they are for the texts of a batch that have ended (`torch.where(lengths > ..., new, old)`)", "test_masks.py::test_memories_of_texts_that_have_ended_stay"),
        model("Layers of several modules in turn, in a list or a dictionary each or all in one list (`for attention, mlp in self.layers`), with a state a layer in the model's loop", "test_parts.py::test_a_state_that_goes_back_among_parts_makes_them_one_layer", "test_gradients_of_parts", "test_parts_with_a_short_last_segment"),
        model("Memories that take a step of descent a segment (TTT, Titans), by `torch.func.grad`, `vmap`, `functional_call` or `torch.autograd.grad`", "test_inner_gradients.py::test_equal_on_diagonals", "test_gradients_of_gradients"),
        zoo("Classic RMT: the top layer feeds the next segment's bottom layer", "classic_rmt", more=("test_no_parallelism_is_said",)),
        model("Random layers, offsets and kinds", "test_random_models.py::test_equal_or_refused", "test_chosen_models", "test_random_glue.py::test_equal_or_refused", offsets="(1,0) (1,1) (1,-1) (2,0) (2,1) (0,2) ...", levels="the skew of the offsets"),
    ]  # fmt: skip
    uses = [
        use("Any number of segments from one capture, 1 included; same code for all", end + "test_one_capture_serves_all_lengths"),
        use("Models that take no more than some length (tables of positions, assertions): captures are no longer than that; where no rules are found within it each length has a program of its own", "test_bounded.py::test_every_length_within_the_bound", "test_ragged_ends_and_batches", "test_a_text_in_parts", "test_longer_inputs_raise_what_the_model_raises"),
        use("Batches; a shorter last or first segment; input shorter than one segment", end + "test_batch_sizes", "test_ragged_last_segment", "test_sizes.py::test_a_third_rest", "test_less_than_one_segment", "test_joins.py::test_every_length[Right]"),
        use("Results joined in joins, cut, joined again; empty parts; masks joined of one piece a segment and cut into blocks", "test_joins.py::test_every_length", "test_gradients"),
        use("Buffers of a few segments that are filled and then slide", "test_joins.py::test_a_buffer_that_fills_up_and_then_slides"),
        use("Parts of texts of one length on CUDA: recorded as one CUDA graph when a part of its kind comes again; texts in turn, written and moved weights", "test_recorded_parts.py::test_parts_give_what_the_model_gives", "test_texts_in_turn_share_recordings", "test_weights_that_are_written_or_moved", "test_lengths_that_do_not_come_again_are_launched", "test_cuda.py::test_parts_that_come_again_are_recorded"),
        use("A text in parts, cut anywhere, equals one call; states are values: batch, gradients, files", "test_advancing.py::test_any_cut_at_segments_equals_one_call", "test_any_cut_inside_segments_equals_one_call", "test_a_state_is_a_value", "test_only_some_states_of_a_batch_go_on", "test_gradients_through_borders", "test_another_process_goes_on"),
        use("A saved program in another process: results, what is left behind, gradients, free sizes; a folder as cache", "test_saved.py::test_another_process_gives_what_the_model_gives", "test_cache_saves_and_finds", "test_what_the_forward_reads_is_compared", "test_code_is_compared", "test_many_writers"),
        use("A queue of documents in one wavefront, each as by itself: whole segments, rests, masks, losses; failing ones, cancelling, an endless source", "test_documents_map.py::test_whole_segments", "test_rests", "test_one_steady_state", "test_a_changed_token_leaves_all_other_documents_bitwise_equal", "test_masks_and_losses_of_each_document", "test_a_document_that_fails_does_not_stop_the_others", "test_documents_are_read_as_there_is_room", "test_what_goes_on_from_call_to_call_does_so", "test_a_document_that_is_written_over_meanwhile_is_no_silent_error"),
        use("The same wavefront cut into bands of layers, of one process or of several", "test_documents_bands.py::test_texts_of_any_lengths", "test_one_ramp_for_all", "test_a_text_that_fails_stops_no_other", "test_ranks.py::test_a_queue_of_texts_is_one_wavefront", "test_a_text_that_fails_on_one_rank_stops_no_other", "test_ranks_that_read_other_queues_are_told"),
        use("Progress is shown; on a CPU it is said where the model itself is faster", "test_documents_map.py::test_progress_is_shown", "test_beyond.py::test_a_program_that_is_slower_than_its_model_says_so"),
        use("Documents that begin with the same segments: these run once, results are whole", "test_documents_map.py::test_segments_with_which_several_begin_run_once", "test_what_else_is_given_tells_documents_apart", "test_forwards_that_need_the_whole_input_share_nothing"),
        use("`generate` of the reference ARMT: greedy, drawn, padded batches, many continuations, past the ends of segments; other models' own on a program", "test_generation.py::test_the_tokens_and_logits_of_the_whole_text", "test_decoders", "test_padding", "test_drawn_tokens_are_those_of_the_classes_of_transformers", "test_options_are_those_of_transformers", "test_what_makes_no_sense_is_refused", "test_many_continuations_of_one_reading", "test_ends_of_rows", "test_a_streamer_gets_the_text_and_each_token", "test_graphs_of_decoders", "test_a_graph_that_computes_something_else_is_not_used", "test_huggingface.py::test_a_model_of_transformers_generates_on_a_program"),
        use("A text without a rest after texts with one: no new capture, unless the model treats it in another way", "test_sizes.py::test_a_text_without_a_rest_after_texts_with_one", "test_a_text_without_a_rest_is_followed_by_itself", "test_replays.py::test_blocks_serve_every_rest"),
        use("A third batch size and a third length of the short segment: no new capture, same code", "test_sizes.py::test_a_third_batch_size", "test_the_code_is_the_same_for_later_batch_sizes", "test_batches_and_rests_together", "test_rests_of_an_armt_with_masks"),
        use("Attention masks padded left or right, `labels` with the loss, `inputs_embeds`, `output_hidden_states=True`, all at once", inputs + "test_arguments_of_an_armt"),
        use("`position_ids`, keyword arguments, defaults, any callable", inputs + "test_positions", "test_keywords_and_defaults", end + "test_any_callable"),
        use("Dicts, tuples, `ModelOutput`s, nested; a result per segment (`logits_0`, `logits_1`, ...) or per layer", inputs + "test_structures"),
        use("A number of each cell in the result: auxiliary losses added up, listed or stacked over layers and segments, divided by a count", "test_collected.py::test_a_number_of_each_cell", "test_a_number_of_the_segments"),
        use("Losses added up segment by segment, divided by what was counted in the input meanwhile: shifted labels, weights, masks", "test_totals.py::test_equal_on_diagonals"),
        use("Tensors that count segments or tokens, without reading the input", "test_collected.py::test_counters"),
        use("Cells and layers of which nothing is read, in the last segment or in all", "test_collected.py::test_dead_cells", "test_inner_gradients.py::test_layers_that_are_dead_at_the_end"),
        use("Input cut by `split`, `chunk`, `tensor_split`, `hsplit`, slices, views, or piece by piece off the front", "test_probe.py::test_ways_to_cut", "test_collected.py::test_ways_to_cut"),
        use("What is not returned is not held: memory does not grow with the segments; the head runs once, on one position", "test_memory.py::test_memory_does_not_grow_with_the_segments", "test_the_head_runs_once_on_one_position"),
        use("State left in attributes, flags, counters and buffers equals the model's own; state kept from call to call", end + "test_state_left_behind_is_equal", guard + "test_state_in_a_list_that_is_replaced"),
        use("State in tuples, named tuples, deques, dataclasses, objects with slots, nested in any depth, in several places at once", "test_containers.py::test_state_goes_on_in_a_container", "test_aliases", "test_containers_that_change_places", "test_deleted_attributes", "test_unregistered_modules"),
        use("A changed flag, number, list, dict, object, function, hook, submodule, class or global, shape, dtype or mode: a new capture", guard + "test_of_the_model", "test_around_the_model", "test_closures_globals_and_objects", "test_another_segment_length", "test_objects_as_arguments"),
        use("Weights that torchao has quantised (int8, weights only), before `optimize` or after it: grouped, integers held once", "test_quantised.py::test_integers_run_grouped_and_are_held_once", "test_models_may_be_quantised_afterwards"),
        use("Weights saved as any others, each by itself: safetensors, `torch.save`", end + "test_weights_are_saved_as_any_others"),
        use("Weights held once; changed in place, swapped, loaded, stepped by an optimizer: seen, no new capture", end + "test_weights_are_held_once", "test_optimizer_steps_are_seen", "test_the_model_keeps_working_and_its_weights_are_seen", guard + "test_of_the_model"),
        use("Integers kept from call to call and gone on from (positions, numbers of segments): any of them, once two or three were seen, where the forward only adds to them; a capture each where it makes something else of them", "test_counted.py::test_two_captures_serve_all_positions", "test_rests", "test_any_way_to_go_on", "test_gradients", "test_more_than_sums"),
        use("A first call that fills tables or caches", guard + "test_a_first_call_that_differs"),
        use("Gradients reach the original parameters; hooks of parameters run", end + "test_gradients_reach_the_parameters", "test_gradients_of_an_armt", guard + "test_hooks_of_parameters_run", "test_modes.py::test_memories_written_without_gradients"),
        use("Training with levels computed again in backward, by level or by blocks; checkpoints of the model are honoured, reentrant ones too", "test_training.py::test_gradients_are_the_same", "test_gradients_of_the_zoo", "test_levels_are_not_kept", "test_checkpoints_of_the_model_are_honoured"),
        use("A training step measured level by level, forwards and backwards: table, viewer, trace", "test_backward_profile.py::test_levels_have_their_part_of_backward", "test_it_is_shown_behind_the_forward"),
        use("Training where memory is short: levels keep their values while it lasts, the others are computed again", "test_fitting.py::test_what_fits_is_kept", "test_less_memory_keeps_fewer_levels", "test_an_optimizer_takes_memory_between_two_steps", "test_a_run_that_ends_without_memory_runs_again"),
        use("A model that is trained from scratch on a task has the losses, the gradients and the answers of sequential training, and reads long texts in parts as the model does", "test_task.py::test_losses_are_the_same_step_by_step", "test_both_have_learned_the_same", "test_reading_in_parts_gives_what_the_model_gives"),
        use("Gradients accumulate; higher derivatives; frozen weights; weights that are computed; a weight written before backward is an error", "test_training.py::test_gradients_accumulate_and_are_cleared", "test_gradients_of_gradients", "test_some_weights_are_frozen", "test_weights_that_are_computed", "test_a_step_between_forward_and_backward_is_no_silent_error"),
        use("`model.to(...)`, `deepcopy`, `torch.save`; weights untied", end + "test_copies_and_conversions", guard + "test_another_dtype_of_the_weights_alone", "test_weights_that_are_tied_no_more"),
        use("`optimize(module)` is a module: names, `state_dict`, `train`, `to`, attributes, hooks, inside other modules, `deepcopy`, `pickle`", mod + "test_it_is_a_module_with_the_names_of_the_model", "test_weights_are_loaded_into_the_model", "test_methods_reach_the_model_and_return_the_module", "test_inside_of_a_module", "test_hooks_run_at_each_call_around_the_program", "test_hooks_of_all_modules_run_once", "test_copies_have_weights_programs_and_hooks_of_their_own"),
        use("`install(model)`: the model's own calls, copies, `generate`, a training loop, undone under what others have wrapped around it", "test_installed.py::test_the_calls_of_a_model_run_what_is_installed", "test_copies_of_a_model_have_a_program_of_their_own", "test_huggingface.py::test_generate_runs_what_is_installed", "test_a_training_loop"),
        use("`Trainer`, `accelerator.prepare` and PEFT's adapters themselves", "test_huggingface.py::test_a_trainer_runs_what_is_installed", "test_a_trainer_of_an_optimized_model", "test_a_loss_of_several_micro_batches", "test_checkpoints_of_activations_are_switched", "test_accelerate_takes_off_what_it_has_put_on", "test_accelerate_prepares_a_program", "test_adapters_of_peft"),
        use("Gradients scaled by `GradScaler`, clipped by `clip_grad_norm_`, steps of any optimizer", mod + "test_gradients_are_scaled_and_clipped"),
        use("`DistributedDataParallel(optimize(model))`, ranks with other numbers of segments, parameters without a gradient; mixed precision as accelerate sets it, around the program or around the model before", mod + "test_data_parallel_around_an_optimized_module", "test_another_forward_around_the_program", "test_a_forward_that_is_wrapped_in_autocast_is_captured"),
        use("The command line: what a machine has and what is missing; mistakes are one line, before anything is compiled", "test_cli.py::test_the_doctor_finds_what_is_there", "test_the_doctor_says_what_is_missing", "test_cli_mistakes.py::test_a_function_that_fails_is_the_users", "test_a_config_of_no_decoder", "test_lazy.py::test_help_and_version_import_no_torch"),
        use("`torch.compile` before and around; an optimized module inside of an optimized model", mod + "test_compiled_before", "test_compiled_after", "test_a_model_with_an_optimized_module_inside_is_captured_as_a_whole", "test_installed.py::test_a_model_inside_of_another_is_captured_with_it"),
        use("float64, float32; bfloat16 and float16 no further from float64 than the sequential forward", end + "test_armt_in_float32", "test_modes.py::test_half_precision_is_no_further_from_float64"),
        use("The call inside `torch.autocast`, regions at any place inside the model; inference mode; train mode", "test_autocast.py::test_a_place_of_a_region", "test_modes.py::test_the_call_inside_autocast", "test_modes_of_gradients", "test_train_mode_without_dropout"),
        use("Training mode with dropout anywhere: in layers, between them, of the input, of weights, in attention; `bernoulli_`, `rand_like`, `randn` and their like written out. Each cell draws its own numbers, gradients are those of the numbers drawn, `torch.manual_seed` and checkpoints draw the same again", "test_dropout.py::test_numbers_are_kept_at_their_rate", "test_results_and_gradients_are_those_of_the_numbers_drawn", "test_places", "test_the_first_call_draws_what_later_ones_do", "test_a_checkpoint_around_the_program_draws_the_same_again", "test_architectures.py::test_armt_in_training_mode"),
        use("Two threads; a run that fails half way, an error in a hook", end + "test_two_threads", "test_a_run_that_fails_leaves_the_next_one_right", "test_an_error_in_a_hook_leaves_the_next_run_right", "test_running_out_of_memory_leaves_the_next_run_right"),
        use("`verify=True`: the first differing cell is named", "test_verify.py::test_the_first_cell_is_named", "test_a_broken_rule_is_found", "test_what_is_left_behind_is_compared"),
        use("Carries that only later segments read; the first longer input is compared with the model", "test_beyond.py::test_a_carry_that_short_captures_do_not_show", "test_it_is_compared_once"),
        use("Longer inputs are followed at each doubling, operation by operation; `explain` says what is proved, followed, compared, extrapolated", "test_outline.py::test_a_rule_that_does_not", "test_beyond.py::test_it_is_followed_at_each_doubling"),
        use("Another rule from some late segment on (`s < 10`), a special segment, a buffer that is full late: read from captures that show it", "test_beyond.py::test_another_rule_late", "test_joins.py::test_what_slides_later_than_all_captures"),
        use("Segments that follow no rule, in texts that are read in one call: a program for each number of them, up to 48", "test_periods.py::test_what_repeats_too_seldom_has_programs_for_each_number", "test_zoo_end_to_end.py::test_a_constant_of_the_segment_follows_no_rule"),
        use("Results from the last segment to the first, and first segments that no layer touches", "test_joins.py::test_lists_that_end_with_the_first_segment"),
        use("Layers that read positions of their segment where it is a part of the input itself", "test_raw_segments.py::test_positions_of_a_segment"),
        use("Parameters that share memory: tied at any time, views of one buffer, of several processes", "test_sharing.py::test_parameters_that_share_memory_go_on_to", "test_memory_of_several_processes_stays_theirs", "test_who_holds_the_memory_of_before_is_told"),
        use("Writes behind `contiguous()` and `reshape()`, for inputs of any strides", "test_layouts.py::test_what_depends_on_layouts_has_a_program_for_each"),
        use("Numbers read from parameters, buffers, closures and counters (`item`, `bool`, `tolist`, an index, a NumPy array); a changed value: a new capture", "test_known.py::test_numbers_of_the_model", "test_counters_of_the_forward", "test_numbers_of_what_the_forward_writes", "test_values.py::test_each_write_is_seen"),
        use("Custom operators (`torch.library`) and fused `nn.LSTM`, `nn.GRU`, `nn.RNN` as layers: they run cell by cell inside of grouped calls, and `explain` names them; `_foreach_*` on lists of states", "test_cell_by_cell.py::test_equal_with_gradients", "test_it_is_said", "test_compiled_cells", "test_dropout_between_recurrent_layers"),
        use("Layers in bands on several devices of one process: any number of bands, values that go down, ragged ends, a text in parts, state, gradients, `recompute=\"level\"`; levels recorded by kind", "test_bands.py::test_as_the_model_for_any_number_of_segments", "test_armt_with_a_ragged_end_and_other_batch_sizes", "test_other_recurrences", "test_a_text_in_parts", "test_gradients", "test_written_weights_are_copied_again", "test_recorded_levels_serve_any_length"),
        use("Bands balanced by what layers of other kinds, a prologue and an epilogue (a head a segment) are measured to cost, alike on all ranks; or with numbers of layers that are given", "test_balanced_bands.py::test_layers_of_another_kind_weigh_more", "test_a_head_a_segment_moves_the_last_border", "test_nothing_is_measured_of_layers_of_one_kind", "test_ranks_divide_alike", "test_layers_by_device"),
        use("Bands in the ranks of a process group or mesh, gradients, hooks, steps of an optimizer, texts in parts and recorded levels included; weights in a mapped file: what differs between ranks is found before the first level, a rank that raises or dies ends all", "test_ranks.py::test_every_rank_gets_what_the_model_gives", "test_recorded_levels_serve_any_length", "test_a_rank_stacks_its_own_layers", "test_hooks_are_called_once", "test_every_rank_of_three_gets_results_and_gradients", "test_weights_stay_those_of_the_model_over_steps", "test_a_text_in_parts_with_gradients_through_its_state", "test_data_parallel_around_bands", "test_a_mesh_and_a_ragged_end", "test_other_weights_are_found_before_the_first_level", "test_a_rank_that_raises_ends_all_with_one_message", "test_a_rank_that_dies_ends_the_others"),
        use("Losses, sums and means of what a boolean mask selects: `cross_entropy(logits[mask], labels[mask])`, `x[mask].mean()`, `masked_select`, `nonzero`, `y[mask] = x[mask]`; of the whole input, a segment or in layers; nothing selected", "test_masks.py::test_equal_on_diagonals", "test_nothing_is_selected", "test_in_segments_and_layers", "test_what_is_not_selected_may_be_undefined"),
        use("Tensors written out in the forward's code", "test_literals.py::test_a_literal_in_every_cell"),
        use("Inductor: new lengths and a third rest compile nothing, batch sizes from the third on once", end + "test_inductor_compiles_nothing_for_new_lengths", "test_sizes.py::test_nothing_is_compiled_for_a_third_rest", "test_later_batch_sizes_are_compiled_once"),
        use("Compiled cells of a saved program are called in another process without being traced", "test_saved.py::test_compiled_cells_are_not_compiled_again", "test_forms.py::test_a_kept_form_is_not_traced", "test_what_does_not_fit_is_compiled"),
        use("On CUDA: recorded runs, other streams, modes and weights in between", "test_cuda.py::test_recorded_runs", "test_changed_weights_are_seen", "test_modes", "test_streams_and_threads"),
    ]  # fmt: skip
    refusals = [
        refused("Control flow and numbers that depend on values of inputs", "`CaptureError` with the line", no + "test_data_dependent_control_flow", "test_shortcuts_of_masks", "test_known.py::test_numbers_of_inputs_are_refused"),
        refused("What a mask selects, where it reaches anything but a sum, a mean, a loss or what treats each row by itself", "`CaptureError` with both lines, and the masked form", "test_masks.py::test_other_uses_are_refused", "test_a_mask_that_changes_in_between_is_another_one", "test_a_selection_that_is_left_behind_is_refused"),
        refused("Rules that repeat every few segments: a layer that waits for one behind it within these, periods above four (texts in parts, queues, more than 48 segments)", "`RerollError` with the places in a circle, or with both operations", periods + "test_layers_that_wait_for_what_is_behind_them_have_no_rules", "test_what_repeats_too_seldom_has_programs_for_each_number"),
        refused("A cache that does not grow evenly: that doubles, say (texts in parts, queues, more than 48 segments)", "`RerollError` with both operations", no + "test_a_cache_that_does_not_grow_evenly", "test_growing_carries.py::test_what_does_not_grow_evenly_has_no_rules"),
        refused("Layers skipped in some segments", "refused", no + "test_layers_called_unevenly"),
        refused("Layers outside that read all segments at once: attention over all positions, a mean, a walk from the end", "`PartitionError` with the operation", order + "test_what_needs_all_segments_is_refused"),
        refused("Layers called as often as the values say", "`CaptureError` with the line", no + "test_calls_that_depend_on_values"),
        refused("Layers left out by a random number; numbers from a generator of the model's own", "`CaptureError` with the line", "test_dropout.py::test_layers_that_are_left_out_at_random_are_refused", "test_generators_of_the_model_are_refused"),
        refused("A forward that writes into a parameter", "`CaptureError`; the parameter keeps its value", no + "test_parameter_writes"),
        refused("State kept in no module: a closure, a global, a class, a plain object, what a hook closes over", "`CaptureError` with the name", guard + "test_state_outside_of_modules_is_refused", "test_containers.py::test_state_that_no_module_keeps_is_refused"),
        refused("State in iterators, in sets of tensors, in modules made by the forward", "`CaptureError` with the place", "test_containers.py::test_iterators_are_refused", "test_trees.py::test_what_cannot_be_made_again_is_refused"),
        refused("Backward hooks of modules, with gradients", "`CaptureError` with the modules", guard + "test_backward_hooks_are_refused"),
        refused("A forward that takes gradients itself, with gradients, where it has a region without them", "`CaptureError`, with the line of the region", "test_inner_gradients.py::test_what_has_no_gradient_is_not_given_one"),
        refused("A custom `autograd.Function`, a reentrant checkpoint of inputs without gradients, in training", "`CaptureError` with its name; runs under `no_grad`", no + "test_a_backward_of_its_own"),
        refused("Operators of other libraries that write into their arguments, in a layer", "`UnsupportedError` with the operator", "test_cell_by_cell.py::test_an_operator_that_writes_is_refused"),
        refused("An argument that is an object with tensors inside", "`UnsupportedError`", guard + "test_objects_as_arguments"),
        refused("A list, dict, cache or other object among the arguments that the forward changes", "`CaptureError`, with its name; it is put back as it was", no + "test_arguments_that_the_forward_fills"),
        refused("A text in parts, where the forward needs all of it; a state of another model, weights, dtype or batch", "`UnsupportedError` with the operation; `StateError`", "test_advancing.py::test_forwards_that_need_the_whole_input_are_refused", "test_states_of_others_are_refused"),
        refused("Saving a program that depends on an object whose contents another process could not compare", "`UnsupportedError` names it; `cache` logs it", "test_saved.py::test_what_has_no_name_is_said"),
        refused("A saved program for another model, state, code or version; a damaged file", "`IgnoredWarning` says what differs; the call is captured", "test_saved.py::test_what_the_forward_reads_is_compared", "test_code_is_compared", "test_another_version_of_torch", "test_damaged_files_are_said"),
        refused("Parameters sharded by `fully_shard` (FSDP) or tensor parallelism", "refused, with what to do instead", mod + "test_sharded_parameters_are_refused"),
        refused("`optimize(DistributedDataParallel(model))`, `nn.DataParallel`, `torch.export` of a program", "refused, with the other order or the model itself as remedy", mod + "test_data_parallel_inside_of_optimize_is_refused", "test_exported"),
        refused("`generate` that passes a cache to the model", "`UnsupportedError` with the class", "test_huggingface.py::test_a_cache_among_the_arguments_is_refused"),
        refused("`generate` of a callable that is no module; `save_on_cpu` inside of the model", "`FallbackWarning`, `IgnoredWarning`, once", mod + "test_generate_of_no_module_says_once_that_it_runs_without_the_program", "test_what_has_no_effect_is_said"),
        refused("Bands of layers where no two cells run together, of more devices than layers, of other numbers of layers than there are, or where all read random numbers; between processes gradients of weights that are computed, gradients of gradients, and transforms of `torch.func`", "`UnsupportedError` with the dependence, or the remedy", "test_bands.py::test_what_cannot_be_cut_is_refused_by_the_dependence_in_the_way", "test_more_bands_than_layers_are_refused", "test_random_numbers_that_all_bands_read_are_refused", "test_balanced_bands.py::test_other_numbers_of_layers_are_refused", "test_ranks.py::test_what_processes_cannot_do_is_refused"),
        refused("No segments, no repeated layers, empty input", "refused, `segment_size=` or `layers=` named", no + "test_no_segments", "test_wrong_layers", "test_empty_input"),
        refused("An error of the model itself", "`CaptureError` with the error and its line", no + "test_an_error_of_the_model_is_shown_with_its_line"),
        refused("`plan=\"diagonal\"` on a model that has none", "`UnsupportedError`; `plan=\"auto\"` runs it sequentially", no + "test_classic_rmt_is_refused_where_diagonals_are_asked_for"),
        refused("A constant that is not affine in s: 1 / (s + 1), a running mean (texts in parts, queues, more than 48 segments)", "`RerollError`", zooed + "test_a_constant_of_the_segment_follows_no_rule"),
    ]  # fmt: skip
    return {
        "models": ("model | dependence offsets (segment, layer) | runs on levels | checked by", models),
        "uses": ("inputs and use | checked by", uses),
        "refused": ("what | what happens | checked by", refusals),
    }


def written(name: str, text: str) -> str:
    """A page's text with the table between its markers."""
    head, rows = tables()[name]
    lines = [f"| {head} |", "| " + " | ".join(["---"] * (head.count("|") + 1)) + " |", *map(str, rows)]
    begin, end = f"<!-- {name}: written by tests/handled.py -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    assert rest.count(end) == 1, f"{PAGES[name]} has no {begin} with one {end} behind it"
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}" + rest.partition(end)[2]


def main() -> None:
    for name, page in PAGES.items():
        path = ROOT / page
        path.write_text(written(name, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()

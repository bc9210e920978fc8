/* The public header in C99: a decode that touches all of it. Returns the line that failed, or 0. */
#include <pid/pid_runtime.h>

#include <stdlib.h>
#include <string.h>

int use_everything_from_c(const char* bundle);

struct counts {
    int warnings;
    int notes;
    int steps;
    int states;
    pid_decoder* decoder;
};

static void count_warning(const char* message, void* user_data) {
    if (strlen(message) > 10)
        ++((struct counts*)user_data)->warnings;
}

static void count_note(pid_log_level level, const char* message, void* user_data) {
    if (strlen(message) > 10)
        ((struct counts*)user_data)->notes += level == PID_LOG_INFO;
}

static int count_step(int32_t steps_done, int32_t steps, void* user_data) {
    struct counts* counts = user_data;
    pid_array* state = NULL;
    counts->steps += steps_done <= steps;
    if (pid_decoder_read_state(counts->decoder, &state) == PID_OK)
        counts->states += pid_array_tensor(state).rank == 4;
    pid_array_free(state);
    return 0;
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return __LINE__;                                                                       \
    } while (0)

static int use_decoder(pid_decoder* decoder, struct counts* counts) {
    float latent[16 * 2 * 3] = {0}, caption[12 * 32] = {0}, sigma = 0.25F;
    const uint64_t seeds[] = {UINT64_MAX};
    const int64_t latent_shape[PID_MAX_RANK] = {1, 16, 2, 3}, caption_shape[] = {1, 12, 32};
    pid_decode_params params = pid_decode_default_params();
    pid_decoder_info info = {.struct_bytes = sizeof info};
    pid_array* image = NULL;
    pid_tensor pixels;
    pid_timings timings = {.struct_bytes = sizeof timings};
    pid_plan plan = {.struct_bytes = sizeof plan};
    int64_t shape[4];
    uint8_t own[64 * 96 * 3];

    CHECK(params.struct_bytes == sizeof params && params.output == PID_FLOAT32);
    CHECK(params.rule == PID_DEFAULT_RULE && params.output_memory == PID_HOST);
    CHECK(pid_decoder_get_info(decoder, &info) == PID_OK);
    CHECK(info.latent_channels == 16 && info.text_dim == 32 && info.text_max_length == 12);
    CHECK(info.pixels_per_latent == 32 && info.default_steps == 4 && info.takes_times == 0);
    CHECK(info.takes_steps == 1 && info.default_rule == PID_SDE && info.default_guidance == 1);
    CHECK(params.guidance == 0 && params.tile_width == 0 && params.overlap == -1);
    CHECK(strcmp(info.precision, "fp32") == 0 && info.max_image_pixels == 1024 * 256);
    CHECK(pid_decoder_model_json(decoder)[0] == '{');
    CHECK(pid_decoder_cuda_stream(decoder) == NULL);

    CHECK(pid_decoder_plan(decoder, 64, 96, 1, NULL, &plan) == PID_OK);
    CHECK(plan.width == 96 && plan.height == 64 && plan.steps == 4 && plan.calls == 4);
    CHECK(plan.tiles == 1 && plan.branches == 1 && plan.reason == NULL && plan.host_bytes == 0);
    CHECK(plan.tflop > 0 && plan.device_bytes > 0 && strstr(plan.text, "96x64: bucket ") != NULL);
    params.tile_width = params.tile_height = 64;
    params.overlap = 0;
    CHECK(pid_decoder_plan(decoder, 64, 96, 1, &params, &plan) == PID_OK);
    CHECK(plan.tiles == 2 && plan.tile_width == 64 && strcmp(plan.reason, "as asked for") == 0);
    CHECK(pid_decoder_plan(decoder, 64, 100, 1, &params, &plan) == PID_ERROR_INPUT);
    CHECK(strstr(pid_last_error(), "expected sides in multiples of 32 pixels") != NULL);
    CHECK(plan.tiles == 2); /* untouched */
    params.tile_width = params.tile_height = 0;
    params.overlap = -1;

    params.latent = pid_host_tensor(latent, PID_FLOAT32, 4, latent_shape);
    params.caption = pid_host_tensor(caption, PID_FLOAT32, 3, caption_shape);
    params.sigma = &sigma;
    params.sigma_count = 1;
    params.seeds = seeds;
    params.seed_count = 1;
    params.steps = 2;
    params.rule = PID_ODE;
    params.output = PID_UINT8;
    params.progress = count_step;
    params.progress_user_data = counts;
    params.timed = 1;
    CHECK(pid_decoder_output_shape(decoder, &params, shape) == PID_OK);
    CHECK(shape[0] == 1 && shape[1] == 64 && shape[2] == 96 && shape[3] == 3);
    pid_decoder_cancel(decoder); /* nothing runs: nothing happens */
    CHECK(pid_decoder_decode(decoder, &params, &image) == PID_OK);
    CHECK(counts->steps == 2 && counts->states == 2 && counts->warnings == 0);
    CHECK(pid_decoder_get_timings(decoder, &timings) == PID_OK);
    CHECK(timings.open_ms > 0 && timings.total_ms > timings.steps_ms && timings.steps_ms > 0);
    pixels = pid_array_tensor(image);
    CHECK(pixels.dtype == PID_UINT8 && pixels.memory == PID_HOST && pixels.rank == 4);
    CHECK(memcmp(pixels.shape, shape, sizeof shape) == 0);
    CHECK(pid_decoder_decode_into(decoder, &params, own, sizeof own) == PID_OK);
    CHECK(memcmp(own, pixels.data, sizeof own) == 0);
    pid_array_free(image);

    params.caption = pid_host_tensor(NULL, PID_FLOAT32, 0, NULL);
    CHECK(pid_decoder_decode_into(decoder, &params, own, sizeof own) == PID_OK);
    CHECK(counts->warnings == 1); /* no caption */
    params.latent = pid_cuda_tensor(latent, PID_FLOAT32, 4, latent_shape);
    CHECK(params.latent.memory == PID_CUDA);
    CHECK(pid_decoder_decode(decoder, &params, &image) == PID_ERROR_INPUT);
    CHECK(strstr(pid_last_error(), "GPU") != NULL);
    return 0;
}

int use_everything_from_c(const char* bundle) {
    struct counts counts = {0, 0, 0, 0, NULL};
    pid_bundle* shared = NULL;
    pid_decoder_params params = pid_decoder_default_params();
    int line;
    CHECK(params.struct_bytes == sizeof params && params.verify != 0 && params.cuda_graphs != 0);
    CHECK(strlen(pid_runtime_version()) >= 5);
    CHECK(strstr(pid_runtime_backends(), "onnxruntime") != NULL);
    CHECK(strcmp(pid_status_name(PID_ERROR_BUSY), "PID_ERROR_BUSY") == 0);
    CHECK(pid_dtype_bytes(PID_BFLOAT16) == 2 && pid_dtype_bytes(PID_FLOAT64) == 8);
    params.backend = "onnxruntime";
    params.device = "cpu";
    params.threads = 1;
    params.verify = 0;
    params.warning = count_warning;
    params.warning_user_data = &counts;
    params.log = count_note;
    params.log_user_data = &counts;
    CHECK(pid_decoder_open(bundle, &params, &counts.decoder) == PID_OK);
    CHECK(counts.notes == 1); /* what loaded the graphs */
    line = use_decoder(counts.decoder, &counts);
    pid_decoder_close(counts.decoder);
    if (line != 0)
        return line;
    CHECK(counts.notes == 2); /* and how large the arena is */
    CHECK(pid_bundle_open(bundle, &params, &shared) == PID_OK);
    CHECK(pid_decoder_create(shared, &params, &counts.decoder) == PID_OK);
    pid_bundle_close(shared);
    counts.steps = counts.states = counts.warnings = 0;
    line = use_decoder(counts.decoder, &counts);
    pid_decoder_close(counts.decoder);
    return line;
}

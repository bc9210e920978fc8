/* pid_runtime.h: decode latents to images with a pid-trt bundle, from C.
 *
 * A complete program, but for the reading of a latent and a caption embedding:
 *
 *     #include <pid/pid_runtime.h>
 *     #include <stdio.h>
 *
 *     static int fail(const char *what) {
 *         fprintf(stderr, "%s: %s\n", what, pid_last_error());
 *         return 2;
 *     }
 *
 *     int decode(const char *bundle, const float *latent, const float *caption) {
 *         pid_decoder_params open = pid_decoder_default_params();
 *         pid_decoder *decoder = NULL;
 *         if (pid_decoder_open(bundle, &open, &decoder) != PID_OK)
 *             return fail(bundle);
 *
 *         const int64_t latent_shape[] = {1, 16, 64, 64}, caption_shape[] = {1, 300, 2304};
 *         pid_decode_params decode = pid_decode_default_params();
 *         decode.latent = pid_host_tensor(latent, PID_FLOAT32, 4, latent_shape);
 *         decode.caption = pid_host_tensor(caption, PID_FLOAT32, 3, caption_shape);
 *         decode.output = PID_UINT8;
 *         pid_array *image = NULL;
 *         if (pid_decoder_decode(decoder, &decode, &image) != PID_OK) {
 *             pid_decoder_close(decoder);
 *             return fail("decode");
 *         }
 *         pid_tensor pixels = pid_array_tensor(image); // uint8 [1, H, W, 3]
 *         printf("%d x %d pixels\n", (int)pixels.shape[2], (int)pixels.shape[1]);
 *         pid_array_free(image);
 *         pid_decoder_close(decoder);
 *         return 0;
 *     }
 *
 * Errors. A function that can fail returns a pid_status; anything but PID_OK leaves its results
 * untouched, and pid_last_error() then says in one line what was expected, what came and how to
 * mend it. Nothing aborts, and no C++ exception leaves the library. After a failed decode the
 * decoder can be used again.
 *
 * Memory. "Borrowed" memory stays the caller's (arguments) or the library's (results) and is not
 * kept longer than said. "Owned" memory is the caller's to give back, by the function named.
 * Tensors are dense and row-major.
 *
 * Threads. A decoder serves one thread at a time, any thread: a call while another runs is refused
 * with PID_ERROR_BUSY. Only pid_decoder_cancel() may be called at any moment. Decoders are
 * independent of each other: use one per thread, of one pid_bundle, so that they share the weights.
 * A bundle serves any number of threads. Error messages are kept per thread.
 *
 * Binary compatibility. Structures begin with their size and only ever grow at the end: fill them
 * with their *_default_params() function, then change members.
 */
#ifndef PID_RUNTIME_H
#define PID_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(PID_RUNTIME_STATIC)
#define PID_API
#elif defined(_WIN32) && defined(PID_RUNTIME_BUILD)
#define PID_API __declspec(dllexport)
#elif defined(_WIN32)
#define PID_API __declspec(dllimport)
#else
#define PID_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Status ---------------------------------------------------------------------------------- */

typedef enum pid_status {
    PID_OK = 0,
    /* Bad input: a broken bundle, a latent of the wrong shape, an unknown provider; and a decode
     * that gave NaN or infinity, whose message names the step. */
    PID_ERROR_INPUT = 1,
    /* No memory for the arena or a result. */
    PID_ERROR_MEMORY = 2,
    /* Stopped by a progress callback or pid_decoder_cancel(). */
    PID_ERROR_CANCELLED = 3,
    /* Another call on the same decoder has not returned. */
    PID_ERROR_BUSY = 4,
    /* The backend failed while it ran: a GPU that was lost, a kernel that refused. */
    PID_ERROR_BACKEND = 5,
    /* A bug of this library. */
    PID_ERROR_INTERNAL = 6
} pid_status;

/* What the last call of this thread that failed has to say: one line, UTF-8, "" if none failed.
 * Borrowed: valid until this thread's next failure. */
PID_API const char* pid_last_error(void);

/* The name of a status, such as "PID_ERROR_INPUT". Borrowed, valid for ever. */
PID_API const char* pid_status_name(pid_status status);

/* Version of this library, such as "0.1.0". Borrowed, valid for ever. */
PID_API const char* pid_runtime_version(void);

/* Backends this library was built with, separated by commas, such as "onnxruntime,tensorrt".
 * Borrowed, valid for ever. */
PID_API const char* pid_runtime_backends(void);

/* ---- Tensors --------------------------------------------------------------------------------- */

typedef int32_t pid_dtype;
enum { PID_FLOAT32 = 0, PID_FLOAT16 = 1, PID_BFLOAT16 = 2, PID_FLOAT64 = 3, PID_UINT8 = 4 };

typedef int32_t pid_memory;
enum {
    PID_HOST = 0,
    /* On the decoder's GPU; for decoders with a GPU backend. */
    PID_CUDA = 1
};

#define PID_MAX_RANK 4

/* A view of dense row-major memory. */
typedef struct pid_tensor {
    /* Borrowed; NULL for "not given". */
    const void* data;
    pid_dtype dtype;
    pid_memory memory;
    int32_t rank;
    int64_t shape[PID_MAX_RANK];
} pid_tensor;

/* A view of `rank` sizes, at most PID_MAX_RANK. `shape` is copied, `data` borrowed. */
PID_API pid_tensor pid_host_tensor(const void* data, pid_dtype dtype, int32_t rank,
                                   const int64_t* shape);
PID_API pid_tensor pid_cuda_tensor(const void* data, pid_dtype dtype, int32_t rank,
                                   const int64_t* shape);

/* Bytes of one value of a dtype; 0 for an unknown one. */
PID_API size_t pid_dtype_bytes(pid_dtype dtype);

/* Memory of a result and its shape. */
typedef struct pid_array pid_array;

/* A view of the array. Borrowed: valid until pid_array_free(). An array of PID_CUDA memory may be
 * used at once, on any stream. `array` may be NULL: the view is then of nothing. */
PID_API pid_tensor pid_array_tensor(const pid_array* array);

/* Give an array back; NULL is nothing to do. Arrays outlive the decoder they came from. */
PID_API void pid_array_free(pid_array* array);

/* ---- Bundle and decoder ---------------------------------------------------------------------- */

/* A bundle, opened on one backend: its graphs with their weights, which its decoders share. */
typedef struct pid_bundle pid_bundle;

/* What decodes: memory, a place in a bundle's graphs, and on a GPU a stream. */
typedef struct pid_decoder pid_decoder;

/* Receives warnings about decodes that run but not as well as they could, one line each; UTF-8,
 * borrowed for the call. */
typedef void (*pid_warning_callback)(const char* message, void* user_data);

typedef int32_t pid_log_level;
enum {
    /* What was chosen and taken: an engine set, memory, a slower way where the fast one fails. */
    PID_LOG_INFO = 0,
    /* What a pid_warning_callback receives. */
    PID_LOG_WARNING = 1
};

/* Receives all that this library has to tell, one line each; UTF-8, borrowed for the call. */
typedef void (*pid_log_callback)(pid_log_level level, const char* message, void* user_data);

/* How to open a bundle and to run a decoder of it. pid_bundle_open() looks at `backend` to
 * `verify`, pid_decoder_create() at `cuda_graphs`, and both at the stream and the callbacks. */
typedef struct pid_decoder_params {
    size_t struct_bytes;
    /* "onnxruntime" (default), "tensorrt", or "tensorrt-rtx", which takes engines of TensorRT for
     * RTX alone; see pid_runtime_backends(). Borrowed for the call, as are all strings here. */
    const char* backend;
    /* Where to run. onnxruntime: "cpu" (NULL), "cuda", "cuda:1", "tensorrt", "nvtensorrtrtx" or a
     * provider's full name. tensorrt: "cuda:0" (NULL) or another GPU. */
    const char* device;
    /* onnxruntime: file of a plug-in provider library to load, whose provider `device` names; NULL
     * for none. Needs ONNX Runtime's headers of 1.22 or later when building. */
    const char* provider_library;
    /* tensorrt: which of the bundle's engine sets to use; NULL for the first that fits the GPU and
     * the library. */
    const char* engine_set;
    /* CPU threads, which a bundle's decoders share; 0 for one per core this process may run on. */
    int32_t threads;
    /* Not 0 (default): compare the SHA-256 of every file with the manifest, not only its size. */
    int32_t verify;
    /* GPU backends: a cudaStream_t (CUstream) of that GPU's primary context for all work; NULL for
     * one of our own. Borrowed until pid_decoder_close(). With onnxruntime it is the bundle's,
     * whose decoders then take turns; with tensorrt the decoder's. */
    void* cuda_stream;
    /* NULL (default) for none. Called by the thread whose call it is about. */
    pid_warning_callback warning;
    void* warning_user_data;
    /* tensorrt: not 0 (default) to record the steps of the second decode in a shape as CUDA graphs
     * and replay them from then on. */
    int32_t cuda_graphs;
    /* As `warning`, for all there is to tell. */
    pid_log_callback log;
    void* log_user_data;
} pid_decoder_params;

PID_API pid_decoder_params pid_decoder_default_params(void);

/* Open a bundle: check its manifest and files, load its graphs (engines when a decoder first needs
 * them). `bundle_path` is a folder; `params` may be NULL for the defaults. Owned: give *bundle to
 * pid_bundle_close(). */
PID_API pid_status pid_bundle_open(const char* bundle_path, const pid_decoder_params* params,
                                   pid_bundle** bundle);

/* Give a bundle back; NULL is nothing to do. Its decoders go on: what they share is given back with
 * the last of them. */
PID_API void pid_bundle_close(pid_bundle* bundle);

/* Make a decoder of an open bundle, which costs its own memory but no weights. `params` may be NULL
 * for the defaults. Owned: give *decoder to pid_decoder_close(). */
PID_API pid_status pid_decoder_create(const pid_bundle* bundle, const pid_decoder_params* params,
                                      pid_decoder** decoder);

/* Both at once: a decoder of a bundle of its own. */
PID_API pid_status pid_decoder_open(const char* bundle_path, const pid_decoder_params* params,
                                    pid_decoder** decoder);

/* Give back a decoder and its memory; NULL is nothing to do. Must not run while another call uses
 * it. */
PID_API void pid_decoder_close(pid_decoder* decoder);

typedef struct pid_decoder_info {
    size_t struct_bytes;
    /* Strings are borrowed from the decoder, valid until pid_decoder_close(), "" when not known. */
    const char* name;
    const char* producer;
    const char* latent_convention;
    /* "fp32", "fp16" or "bf16" */
    const char* precision;
    int64_t latent_channels;
    /* Height of the image per height of the latent, and width likewise. */
    int64_t pixels_per_latent;
    int64_t text_dim;
    int64_t text_max_length;
    /* Most pixels of one image: height times width. */
    int64_t max_image_pixels;
    int32_t default_steps;
    int32_t max_steps;
    /* 1 when a decode may give `times`, and must unless `takes_steps` is 1. */
    int32_t takes_times;
    /* 1 when a decode may give `steps`, or neither. */
    int32_t takes_steps;
    /* A pid_rule. */
    int32_t default_rule;
    /* 1, or more where a decode needs a `negative` caption unless it says guidance 1. */
    double default_guidance;
} pid_decoder_info;

/* Fill `info`, whose `struct_bytes` must be set (in C and C++20):
 * pid_decoder_info info = {.struct_bytes = sizeof info}. */
PID_API pid_status pid_decoder_get_info(const pid_decoder* decoder, pid_decoder_info* info);

/* What the bundle's manifest says about its model, as JSON. Borrowed: valid until
 * pid_decoder_close(). */
PID_API const char* pid_decoder_model_json(const pid_decoder* decoder);

/* The stream that GPU work of this decoder runs on (a cudaStream_t); NULL on the CPU. Borrowed:
 * valid until pid_decoder_close(), or the caller's own. */
PID_API void* pid_decoder_cuda_stream(const pid_decoder* decoder);

/* ---- Decode ---------------------------------------------------------------------------------- */

typedef int32_t pid_rule;
enum {
    /* The bundle's: its `default_rule`. */
    PID_DEFAULT_RULE = -1,
    /* Adds noise between steps; what distilled decoders were trained for. */
    PID_SDE = 0,
    PID_ODE = 1,
    /* DPM-Solver++(2M), for undistilled networks. */
    PID_DPMPP_2M = 2
};

/* In place of a tile's width and height: tiles where the picture needs them. */
#define PID_TILE_AUTO (-1)

/* Called after every call of the network, of which there is one per step, times tiles, times 2 with
 * guidance. Return 0 to go on, anything else to stop with PID_ERROR_CANCELLED. May call
 * pid_decoder_read_state() and pid_decoder_cancel(), and must not throw. */
typedef int (*pid_progress_callback)(int32_t calls_done, int32_t calls, void* user_data);

typedef struct pid_decode_params {
    size_t struct_bytes;
    /* All memory here is borrowed for the call. Tensors may lie on the decoder's GPU if it has one:
     * work that fills them must have ended or been put on the decoder's stream. Those on the host
     * may be PID_FLOAT32, PID_FLOAT16, PID_BFLOAT16 or PID_FLOAT64 and are looked through for NaN
     * and infinity; those on a GPU must be PID_FLOAT32 and are taken as they are. */

    /* [B, C, h, w], normalised as `latent_convention` says. */
    pid_tensor latent;
    /* Gemma-2 embedding [B, T, text_dim], or [1, T, text_dim] for all; T at most text_max_length.
     * Not given: zeros, which cost quality. */
    pid_tensor caption;
    /* Noise level of the latents in [0, 1]: `sigma_count` is B, 1 (for all) or 0 (all are 0,
     * clean). */
    const float* sigma;
    size_t sigma_count;
    /* `seed_count` is B, 1 (image b of the batch uses seed + b) or 0 (seed 0). The same seed makes
     * the same noise on every backend. */
    const uint64_t* seeds;
    size_t seed_count;
    /* [B, 3, H, W] standard normal, in place of the seeds' first draw; not given: from the seeds.
     */
    pid_tensor noise;
    /* `step_noise_count` is 0, or steps - 1 of the same in place of the later draws; those not
     * given come from the seeds. */
    const pid_tensor* step_noise;
    size_t step_noise_count;
    /* 0 (default) for the bundle's. */
    int32_t steps;
    /* Default PID_DEFAULT_RULE. */
    pid_rule rule;
    /* `time_count` times, descending from at most 1 to 0: only for bundles whose `takes_times`
     * is 1. Not with `steps`, unless of as many. */
    const double* times;
    size_t time_count;
    /* PID_FLOAT32 (default): [B, 3, H, W] in [-1, 1]. PID_UINT8: [B, H, W, 3]. RGB. */
    pid_dtype output;
    /* Where pid_decoder_decode() puts the result: PID_HOST (default), or PID_CUDA with a GPU
     * backend. */
    pid_memory output_memory;
    /* NULL (default) for none. */
    pid_progress_callback progress;
    void* progress_user_data;
    /* Not 0: measure the decode for pid_decoder_get_timings(), which on a GPU waits for it between
     * sections. 0 (default) costs nothing. */
    int32_t timed;
    /* Of undistilled bundles: a caption to stay away from, as `caption` and of as many tokens.
     * Given with guidance, and only then. */
    pid_tensor negative;
    /* Of undistilled bundles: how much more of the caption than of `negative`, from 1 (the caption
     * alone, half the work) to 100; 0 (default) for the bundle's. */
    double guidance;
    /* Decode in tiles within each step, every one run as an image of its own. Width and height in
     * pixels of the result, multiples of `pixels_per_latent`; both 0 (default) for the whole
     * picture at once; both PID_TILE_AUTO for tiles where no bucket holds the picture, where it is
     * larger than the decoder was trained for, or than memory allows, as the log then says. */
    int64_t tile_width;
    int64_t tile_height;
    /* Of neighbouring tiles, in the same pixels, the least; -1 (default) for 8 pixels of the
     * latent. */
    int64_t overlap;
} pid_decode_params;

PID_API pid_decode_params pid_decode_default_params(void);

/* Decode latents to images. Nothing runs for a request that is refused. When it returns the work
 * has ended, on the GPU as well. Owned: give *image to pid_array_free().
 *
 * The decoder keeps its arena: shapes that fit in it decode in the same memory, a larger one
 * replaces it, and only a change of shape prepares the program anew. */
PID_API pid_status pid_decoder_decode(pid_decoder* decoder, const pid_decode_params* params,
                                      pid_array** image);

/* The same into memory of the caller: `data` has `data_bytes`, which must be what the images take,
 * and lies where `output_memory` says. */
PID_API pid_status pid_decoder_decode_into(pid_decoder* decoder, const pid_decode_params* params,
                                           void* data, size_t data_bytes);

/* The shape of the images of a request, without decoding it; only `latent`, `output`, the tile and
 * the overlap are looked at. `shape` gets 4 sizes. */
PID_API pid_status pid_decoder_output_shape(const pid_decoder* decoder,
                                            const pid_decode_params* params, int64_t* shape);

/* What a decode would take. Strings are borrowed from the decoder, valid until its next
 * pid_decoder_plan() or pid_decoder_close(). */
typedef struct pid_plan {
    size_t struct_bytes;
    /* Of the image, in pixels. */
    int64_t width;
    int64_t height;
    /* What the picture, or a tile, is decoded in. */
    const char* bucket;
    int32_t steps;
    /* 2 with guidance, else 1. */
    int32_t branches;
    int64_t tiles;
    /* Of a tile in pixels; the image's where there is one. */
    int64_t tile_width;
    int64_t tile_height;
    /* Of the network: steps, times tiles, times branches. */
    int64_t calls;
    /* 10^12 floating-point operations, 2 for every multiply-add. */
    double tflop;
    /* Weights, arena and the state where it lies there; what graphs work in comes on top. */
    int64_t device_bytes;
    /* Image, and state, where the host has them; 0 where the device has all. */
    int64_t host_bytes;
    /* Why there are tiles; NULL where there are none. */
    const char* reason;
    /* All of that for people, on one line. */
    const char* text;
} pid_plan;

/* Fill `plan`, whose `struct_bytes` must be set, with what a decode of `batch` latents to `height`
 * x `width` pixels would take; nothing is run. Of `params`, NULL for the defaults, steps, times,
 * rule, guidance, the tile and the overlap are looked at; guidance needs no `negative` here.
 * Refused as a decode is, and for sides that are no multiples of `pixels_per_latent`. */
PID_API pid_status pid_decoder_plan(pid_decoder* decoder, int64_t height, int64_t width,
                                    int64_t batch, const pid_decode_params* params, pid_plan* plan);

/* The sampler's state after the last step that ran, float32 [B, L, P * P, 3] on the host, in the
 * order of patches, pixels and channels; for previews and tests. May be called by a progress
 * callback; of a decode in tiles or with guidance, or by PID_DPMPP_2M, only there: it is kept no
 * longer. Owned: give *state to pid_array_free(). */
PID_API pid_status pid_decoder_read_state(pid_decoder* decoder, pid_array** state);

/* Where the time of a decode went, in milliseconds of the clock. */
typedef struct pid_timings {
    size_t struct_bytes;
    /* Opening the bundle: reading, hashing and loading it. Not part of a decode. */
    double open_ms;
    /* Making ready for the shape: its arena and tables. About 0 when it is that of the decode
     * before. */
    double prepare_ms;
    /* Inputs, and what comes before the first step. */
    double prologue_ms;
    /* All steps, progress callbacks included. */
    double steps_ms;
    /* The image, and its way to the caller. */
    double image_ms;
    /* Of the decode: the four above. */
    double total_ms;
} pid_timings;

/* Fill `timings`, whose `struct_bytes` must be set, with those of the last decode. Refused unless
 * it was `timed` and ran to its end. */
PID_API pid_status pid_decoder_get_timings(pid_decoder* decoder, pid_timings* timings);

/* Stop the decode that runs on another thread, before its next graph; without one, nothing happens.
 * May be called at any moment between open and close, by any thread or from a signal handler. */
PID_API void pid_decoder_cancel(pid_decoder* decoder);

#ifdef __cplusplus
}
#endif

#endif

// Score images with an exported model: OpenVINO's C++ API, and stb_image to read PNG, JPEG and BMP.
//
//   detect MODEL_DIR IMAGE [IMAGE ...]
#include <cstdio>
#include <string>

#include <openvino/openvino.hpp>

#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>

int main(int argc, char** argv) try {
    if (argc < 3) {
        std::fprintf(stderr, "usage: %s MODEL_DIR IMAGE [IMAGE ...]\n", argv[0]);
        return 2;
    }
    ov::Core core;
    auto model = core.read_model(std::string(argv[1]) + "/model.xml");

    // The graph takes float RGB in [0, 1], planes apart, of any size. Here conversion and scaling become part of it.
    ov::preprocess::PrePostProcessor steps(model);
    steps.input().tensor().set_element_type(ov::element::u8).set_layout("NHWC");
    steps.input().model().set_layout("NCHW");
    steps.input().preprocess().convert_element_type(ov::element::f32).scale(255.0f);
    model = steps.build();

    // Without the hint, processors with bfloat16 compute in it, and scores move by up to 4 %.
    auto request = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32)).create_infer_request();

    int unreadable = 0;
    for (int i = 2; i < argc; ++i) {
        int width, height, channels;
        unsigned char* pixels = stbi_load(argv[i], &width, &height, &channels, 3);
        if (!pixels) {
            std::fprintf(stderr, "%s: %s\n", argv[i], stbi_failure_reason());
            ++unreadable;
            continue;
        }
        request.set_input_tensor(ov::Tensor(ov::element::u8, {1, size_t(height), size_t(width), 3}, pixels));
        request.infer();
        const float score = request.get_tensor("pred_score").data<float>()[0];  // in [0, 1], the threshold is 0.5
        const bool anomalous = request.get_tensor("pred_label").data<bool>()[0];
        std::printf("%s\t%.6f\t%s\n", argv[i], score, anomalous ? "anomalous" : "normal");
        stbi_image_free(pixels);
    }
    return unreadable ? 1 : 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
}

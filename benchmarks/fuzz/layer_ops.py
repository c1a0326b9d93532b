"""`keras.layers`: ways to make and call each layer, or the reason why there is none."""

from benchmarks.fuzz.drawing import Draw, Operations

operations = Operations()


def _layers(text: str, ranks: tuple[int, ...] = (2, 3, 4)) -> None:
    """Adds a layer per line, `how to make it | arguments (h) | what of its result`."""
    for line in filter(None, map(str.strip, text.splitlines())):
        made, *rest = line.split(" | ")
        called, taken = (*rest, *("h", "")[len(rest) :])

        @operations.add(line, ranks)
        def _layer(
            draw: Draw, made: str = made, called: str = called, taken: str = taken
        ) -> str:
            return f"{draw.layer(draw.fill(made))}({draw.fill(called)}){taken}"


_layers(
    """
    Activation("gelu")
    ActivityRegularization(0.1, 0.2)
    Add() | [h, {same}]
    Average() | [h, {same}]
    Concatenate() | [h, {same}]
    Concatenate(axis=0) | [h, {same}]
    Maximum() | [h, {same}]
    Minimum() | [h, {same}]
    Multiply() | [h, {same}]
    Subtract() | [h, {same}]
    Dense({units}, activation="tanh")
    Dense({units})
    Dense({units}, use_bias=False)
    BatchNormalization() | h, training=True
    BatchNormalization(axis=1) | h, training=True
    BatchNormalization() | h, training=False
    LayerNormalization()
    LayerNormalization(axis=[1])
    RMSNormalization()
    UnitNormalization()
    GroupNormalization(1)
    GroupNormalization(-1)
    Normalization(mean=0.5, variance=2.0)
    ELU()
    ReLU(max_value=1.0, negative_slope=0.1)
    LeakyReLU()
    PReLU()
    Softmax()
    Flatten()
    Identity()
    Lambda(lambda z: z * 2.0)
    Masking(0.7)
    Rescaling(0.5, 0.1)
    Discretization([-0.5, 0.5])
    Dropout(0.4, seed=4) | h, training=False
    AlphaDropout(0.4, seed=4) | h, training=False
    GaussianDropout(0.4, seed=4) | h, training=False
    GaussianNoise(0.4, seed=4) | h, training=False
    SpectralNormalization(keras.layers.Dense(3)) | h, training=False
    """
)
_layers(
    """
    RepeatVector(3)
    CategoryEncoding(9, "count") | {ids}
    GRUCell(3) | h, {units3} | [0]
    LSTMCell(3) | h, [{units3}, {units3}] | [0]
    SimpleRNNCell(3) | h, {units3} | [0]
    """,
    (2,),
)
_layers(
    """
    Conv1D({units}, {small}, strides={small}, padding="same")
    Conv1D({units}, 2, dilation_rate=2, padding="causal")
    Conv1DTranspose({units}, {small}, strides={small}, padding="same")
    DepthwiseConv1D({small}, strides={small}, padding="same")
    SeparableConv1D({units}, {small}, padding="same")
    MaxPooling1D({small}, {small}, padding="same")
    AveragePooling1D({small}, {small}, padding="same")
    AdaptiveAveragePooling1D(2)
    AdaptiveMaxPooling1D(2)
    GlobalAveragePooling1D()
    GlobalMaxPooling1D(keepdims=True)
    Cropping1D((0, 1))
    ZeroPadding1D((1, 2))
    UpSampling1D(2)
    Permute((2, 1))
    Reshape((-1, 1))
    Dot(axes=2) | [h, {same}]
    Dot(axes=1, normalize=True) | [h, {same}]
    EinsumDense("abc,cd->abd", (None, {units}), bias_axes="d")
    Embedding(9, {units}) | {ids}
    ReversibleEmbedding(9, {units}) | {ids}
    Attention() | [h, {same}]
    Attention(use_scale=True, score_mode="concat") | [h, {same}]
    AdditiveAttention() | [h, {same}]
    MultiHeadAttention(2, 3) | h, h
    MultiHeadAttention(2, 3) | h, {same}, use_causal_mask=True
    GroupQueryAttention(3, 4, 2) | h, {same}
    SimpleRNN({units}, return_sequences={bool})
    GRU({units}, return_sequences={bool})
    GRU({units}, reset_after=False, go_backwards=True)
    LSTM({units}, return_sequences={bool})
    LSTM({units}, unroll=True)
    RNN(keras.layers.StackedRNNCells([keras.layers.LSTMCell(2)] * 2))
    Bidirectional(keras.layers.LSTM(3))
    TimeDistributed(keras.layers.Dense(3))
    SpatialDropout1D(0.4, seed=4) | h, training=False
    """,
    (3,),
)
_layers(
    """
    Conv2D({units}, {small}, strides={small}, padding="same")
    Conv2D({units}, {small}, activation="relu")
    Conv2D({grouped}, {small}, groups={groups}, padding="same")
    Conv2D({units}, 2, dilation_rate=2, padding="same")
    Conv2DTranspose({units}, {small}, strides={small}, padding="same")
    DepthwiseConv2D({small}, strides={small}, padding="same")
    DepthwiseConv2D({small}, depth_multiplier=2, padding="same")
    SeparableConv2D({units}, {small}, strides={small}, padding="same")
    MaxPooling2D({small}, {small}, padding="same")
    MaxPooling2D(2)
    AveragePooling2D({small}, {small}, padding="same")
    AdaptiveAveragePooling2D(2)
    AdaptiveMaxPooling2D(2)
    GlobalAveragePooling2D()
    GlobalMaxPooling2D()
    Cropping2D(((0, 1), (0, 0)))
    ZeroPadding2D(((1, 0), (2, 1)))
    UpSampling2D(2)
    UpSampling2D((2, 3), interpolation="bilinear")
    Resizing(5, 4)
    CenterCrop(1, 1)
    ConvLSTM1D({units}, 2, padding="same")
    SpatialDropout2D(0.4, seed=4) | h, training=False
    """,
    (4,),
)
_layers(
    """
    Conv3D({units}, {small}, strides={small}, padding="same")
    Conv3DTranspose({units}, {small}, strides={small}, padding="same")
    MaxPooling3D({small}, {small}, padding="same")
    AveragePooling3D({small}, {small}, padding="same")
    AdaptiveAveragePooling3D(2)
    AdaptiveMaxPooling3D(2)
    GlobalAveragePooling3D()
    GlobalMaxPooling3D()
    Cropping3D(((0, 1), (0, 0), (0, 0)))
    ZeroPadding3D(1)
    UpSampling3D(2)
    ConvLSTM2D({units}, 2, padding="same")
    SpatialDropout3D(0.4, seed=4) | h, training=False
    """,
    (5,),
)

EXCLUDED = {
    "stands for what it is derived into": "Layer Wrapper Pipeline",
    "an input of a model, no computation": "InputLayer",
    "turns text to numbers, or looks up a table, in the input pipeline": (
        "Hashing HashedCrossing IntegerLookup StringLookup TextVectorization"
    ),
    "changes images at random, in the input pipeline": (
        "AugMix AutoContrast ContrastLimitedAdaptiveHistogramEqualization CutMix "
        "Equalization MaxNumBoundingBoxes MixUp RandAugment RandomBrightness "
        "RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop "
        "RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur "
        "RandomGrayscale RandomHue RandomInvert RandomPerspective RandomPosterization "
        "RandomRotation RandomSaturation RandomSharpness RandomShear RandomTranslation "
        "RandomZoom Solarization"
    ),
    "turns sound to spectra, in the input pipeline": "MelSpectrogram STFTSpectrogram",
    "wraps a program of another framework": (
        "FlaxLayer JaxLayer TFSMLayer TorchModuleWrapper"
    ),
    "is ConvLSTM2D with one dimension more: its programs take minutes": "ConvLSTM3D",
}
